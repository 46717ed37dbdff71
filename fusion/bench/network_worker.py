"""A process that measures one network: requests and answers are lines of JSON on standard input and output."""

from fusion.bench.answers import answer_requests
from fusion.bench.network_case import NetworkCase


def make_bench(request: dict):
    """The network that a first request names."""
    from fusion.bench.network_bench import NetworkBench

    return NetworkBench(NetworkCase(**request["case"]), request["tune"], request["by_block"])


if __name__ == "__main__":
    answer_requests(make_bench)
