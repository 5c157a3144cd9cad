"""cosup within other libraries: one module each, imported only where that library is."""
