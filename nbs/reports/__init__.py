"""The parameterised reports: notebooks that papermill runs, shipped as package data."""
