"""The paper's network parts: pure tensor modules, each with a null object for the ablations."""
