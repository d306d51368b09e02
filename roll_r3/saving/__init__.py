"""What a run saves: the directory of a checkpoint, what shows that it is whole, and what goes on from it."""
