"""The contract between the rooms of the package: `FitConfig` is what may be asked of a fit."""
