"""The checks that every detector passes, by theme; `umiad.detectors.check` is their public face."""
