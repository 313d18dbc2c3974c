"""The stages of the pass, one file each: functions from inputs and settings to artifacts in the work folder."""
