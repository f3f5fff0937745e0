"""What torch's CPU allocator took, to hold a plan against."""

import gc

import torch


def measured_peak(work):
    """Peak bytes of torch's CPU allocator during `work`, kernels' own temporaries included."""
    # What earlier tests left would be freed in between and counted as negative.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak
