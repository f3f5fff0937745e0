"""Progress events: time of a stage, what remains of it at the pace of this process, stages that take turns."""

from ltxkern.pipeline.run.progress import ProgressClock, ProgressEvent, report

# (moment, stage, done, total) as reported; (seconds, remaining) as told.
TOLD = [
    ((1.0, "text", 0, 1), (0.0, None)),
    ((3.0, "text", 1, 1), (2.0, 0.0)),
    ((3.0, "stage 1", 0, 10), (0.0, None)),
    ((5.0, "stage 1", 1, 10), (2.0, 18.0)),
    ((7.0, "stage 1", 2, 10), (4.0, 16.0)),
    # A stage that another process began: six steps cost nothing here.
    ((10.0, "stage 2", 0, 8), (0.0, None)),
    ((11.0, "stage 2", 7, 8), (1.0, 1.0)),
    ((12.0, "stage 2", 8, 8), (2.0, 0.0)),
    # Decoding does not report its beginning, and takes turns with writing.
    ((16.0, "video", 1, 4), (4.0, 12.0)),
    ((17.0, "writing", 1, 8), (1.0, 7.0)),
    ((21.0, "video", 2, 4), (9.0, 9.0)),
    ((22.0, "writing", 2, 8), (6.0, 18.0)),
    # One that has ended begins anew.
    ((30.0, "text", 1, 1), (8.0, 0.0)),
]


def test_events_carry_the_time_of_their_stage() -> None:
    told: list[ProgressEvent] = []
    moments = iter([0.0, *(reported[0] for reported, _ in TOLD)])
    clock = ProgressClock(told.append, now=lambda: next(moments))
    for (_, *reported), _ in TOLD:
        clock(*reported)
    assert told == [ProgressEvent(*reported, *times) for (_, *reported), times in TOLD]


def test_where_nobody_listens_nothing_is_told() -> None:
    report(None, "text", 0, 1)
