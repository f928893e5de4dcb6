"""The controller of Quick-Tune runs: one turn, two back ends, and the command line `qtt`."""
