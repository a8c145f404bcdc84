"""Laws fitted to the results of many runs, and studies: many runs from one file."""
