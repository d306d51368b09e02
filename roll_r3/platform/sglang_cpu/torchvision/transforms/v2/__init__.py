"""Version 2 of the transforms: imported, never called."""
