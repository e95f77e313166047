"""From texts to a data set directory, in tasks that any number of processes may run."""
