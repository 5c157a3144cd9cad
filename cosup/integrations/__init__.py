"""cosup's losses in the shapes that other libraries want: one file for each library, imported by whoever has it."""
