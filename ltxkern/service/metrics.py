"""The counters of the service in the text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ltxkern.service.store import DONE, ENDED, Store
from ltxkern.service.supervisor import Supervisor

Sample = tuple[str, float]


def prometheus(store: Store, supervisor: Supervisor, served: Mapping[tuple[str, int], int]) -> str:
    """All of them.

    Args:
        store, supervisor: of the service.
        served: answers by method and status.
    """
    jobs = [(f'{{status="{status}"}}', count) for status, count in store.counts().items()]
    ended = [(f'{{status="{status}"}}', supervisor.ended[status]) for status in ENDED]
    # A copy: a request that is answered meanwhile may add one.
    answers = [(f'{{method="{method}",status="{status}"}}', count) for (method, status), count in [*served.items()]]
    lines = [
        *_metric("ltxkern_jobs", "gauge", "videos in the queue and kept, by state", jobs),
        *_metric("ltxkern_jobs_ended_total", "counter", "videos that ended since the server started", ended),
        *_metric(
            "ltxkern_job_seconds_total", "counter", "seconds of those done, start to end", [("", supervisor.seconds)]
        ),
        *_metric("ltxkern_job_seconds_count", "counter", "videos among these", [("", supervisor.ended[DONE])]),
        *_metric("ltxkern_worker_ready", "gauge", "1 where a worker is ready", [("", supervisor.ready.is_set())]),
        *_metric("ltxkern_worker_starts_total", "counter", "workers started", [("", supervisor.starts)]),
        *_metric("ltxkern_http_responses_total", "counter", "answers by method and status", answers),
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{labels} {float(value):g}"
