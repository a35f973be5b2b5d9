"""`crossent bench`: this library and its peers, timed in one run on the same inputs."""
