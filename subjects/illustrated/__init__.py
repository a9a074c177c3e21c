"""The illustrated world: pictures and captions that the program draws itself."""
