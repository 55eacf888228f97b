"""Everything that can be trained, behind one interface."""
