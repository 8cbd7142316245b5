"""Without a network: one attempt, then the cache alone."""

import http.server
import threading
from collections.abc import Iterator

import datasets
import pytest
from huggingface_hub import constants

from salt_jax.errors import InputError
from salt_jax.evaluation import harness_tasks
from salt_jax.evaluation.few_shot import FewShot


class _Refuses(http.server.BaseHTTPRequestHandler):
    """A Hub that wants something else of us, but is there."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """The libraries online, their Hub on this machine."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = http.server.HTTPServer(("127.0.0.1", 0), _Refuses)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_that_answers_is_used(hub: http.server.HTTPServer) -> None:
    harness_tasks._go_offline_if_the_hub_is_unreachable()
    assert not datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_out_of_reach_is_asked_once(
    hub: http.server.HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match=r"run datasets\.load_dataset\('allenai/ai2_arc', 'ARC-E"):
        harness_tasks.load(FewShot(["arc_easy"]))
    assert datasets.config.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
    assert "data sets are read from the cache alone" in capsys.readouterr().out
