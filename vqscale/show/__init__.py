"""What people look at: the board of a run, pictures, pages, progress. Nothing here is measured."""
