"""Experiment trackers, one file each, found through lumina.config.registry.TRACKERS.

A file's TRACKER is a class that lumina.monitor.tracking.Tracker describes, made without arguments in a thread of its
own. Another package adds one by an entry point:

    [project.entry-points."lumina.trackers"]
    aim = "my_package.aim:TRACKER"
"""
