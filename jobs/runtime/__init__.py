"""What jobs, serving and sweeps share: settings from a command line, starting Ray, submitting, training processes, stops."""
