"""cosup with other libraries: one module each, imported only where that library is."""
