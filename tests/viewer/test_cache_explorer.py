"""CacheExplorer shows what the cache did: compared with the cache itself, and read off the page in a real browser."""

import contextlib
import json
import re
import shutil

import numpy as np
import pytest

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import KVCache, enable_kv_cache
from tinytorch.models.llama import Llama
from tinytorch.models.transformer import GPT
from tinytorch.viewer.cache_explorer import NOT_VISIBLE, CacheExplorer, multiplications

PROMPT, NEW = [5, 3, 8, 1, 9], 6
L, E, H, H_KV, D, V = 2, 16, 4, 2, 4, 11


@pytest.fixture
def model():
    model = GPT(V, E, L, H, 32, num_kv_heads=H_KV, rng=np.random.default_rng(0))
    for parameter in model.parameters():
        parameter.data *= 5  # weights that make attention choose
    return model


@pytest.fixture
def explorer(model):
    return CacheExplorer.record(model, PROMPT, NEW)


def test_the_recorded_text_is_what_the_model_generates(model, explorer):
    assert explorer.recording["tokens"] == [str(token) for token in model.generate(PROMPT, NEW)]


def test_each_step_equals_the_cache_of_a_run_by_hand(model, explorer):
    tokens = [int(text) for text in explorer.recording["tokens"]]
    model.eval()
    cache = enable_kv_cache(model)
    assert len(explorer.recording["steps"]) == NEW
    assert explorer.recording["allocated_bytes"] == cache.nbytes
    for count, step in enumerate(explorer.recording["steps"]):
        start = cache.seq_pos
        with no_grad():
            model(np.array([tokens[start : len(PROMPT) + count]]))
        new = list(range(start, cache.seq_pos))
        assert step["tokens_cached"] == cache.seq_pos and step["rows"] == len(new)
        assert step["used_bytes"] == 2 * L * H_KV * D * 4 * cache.seq_pos
        assert step["written"] == [[new] * H_KV] * L


def test_a_model_whose_heads_are_wider_than_their_share():
    model = Llama(V, E, L, H, 32, num_kv_heads=H_KV, head_dim=6, window=3, rng=np.random.default_rng(0))
    recording = CacheExplorer.record(model, PROMPT, NEW).recording
    assert recording["tokens"] == [str(token) for token in model.generate(PROMPT, NEW)]
    weights = sum(p.size for block in model.blocks for p in block.parameters() if p.ndim == 2)
    for step in recording["steps"]:
        keys = step["tokens_cached"]
        assert step["multiplications_without"] == keys * (weights + L * H * 6 * 2 * keys) + V * E
        assert all(w == NOT_VISIBLE for head in step["weights"][0] for w in head[: keys - 3])
        assert all(w != NOT_VISIBLE for head in step["weights"][0] for w in head[keys - 3 : keys])


def test_a_given_cache_is_recorded_and_must_be_empty(model, explorer):
    cache = KVCache(1, 32, L, H_KV, D)
    recorded = CacheExplorer.record(model, PROMPT, NEW, cache=cache).recording
    assert recorded == explorer.recording and cache.seq_pos == len(PROMPT) + NEW - 1
    with pytest.raises(ValueError, match="empty cache"):
        CacheExplorer.record(model, PROMPT, NEW, cache=cache)


def test_weights_are_a_distribution_over_the_cached_positions(explorer):
    for step in explorer.recording["steps"]:
        for layer in step["weights"]:
            weights = np.array(layer)
            assert weights.shape == (H, step["tokens_cached"])
            assert (weights != NOT_VISIBLE).all()
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-3)
    first, second = (np.array(explorer.recording["steps"][-1]["weights"][layer]) for layer in (0, 1))
    assert not np.allclose(first, second)


def test_multiplications_are_those_of_a_count_by_hand(model):
    qkv, out, mlp = E * (H + 2 * H_KV) * D, E * E, 2 * E * 4 * E
    per_row = L * (qkv + out + mlp)
    per_row_and_key = L * H * D * 2
    assert multiplications(model, 3, 7) == 3 * per_row + 3 * 7 * per_row_and_key + E * V


def test_the_model_is_left_as_it_was(model):
    attentions = [block.attention for block in model.blocks]
    model.train()
    CacheExplorer.record(model, PROMPT, NEW)
    assert [block.attention for block in model.blocks] == attentions
    assert model.training and model._kv_cache is None
    with pytest.raises(ValueError, match="max_seq_len=32"):
        CacheExplorer.record(model, PROMPT, 40)
    assert [block.attention for block in model.blocks] == attentions


def test_an_enabled_cache_and_the_modes_of_parts_are_left_as_they_were(model):
    cache, other = enable_kv_cache(model), GPT(V, E, L, H, 32, num_kv_heads=H_KV, rng=np.random.default_rng(0))
    model.eval()
    model(np.array([[1, 2]]))
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    parts = [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]
    recorded = CacheExplorer.record(model, PROMPT, NEW).recording
    after = [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]
    assert len(after) == 4 and all(a is b for a, b in zip(after, parts))
    assert [module.training for module in model.modules()] == modes
    assert model._kv_cache is cache and cache.seq_lens == [2] and cache.pending_layers == []
    other.load_state_dict(model.state_dict())
    assert recorded["tokens"] == [str(token) for token in other.generate(PROMPT, NEW)]


def test_the_page_asks_for_nothing_from_outside(explorer):
    page = explorer.to_html()
    assert not re.search(r"(src|href)\s*=|@import|fetch\(|import\(|https?://(?!www\.w3\.org/2000/svg)", page)


def test_text_cannot_break_out_of_the_page(model):
    page = CacheExplorer.record(model, PROMPT, 1, decode=lambda _: "</script><b>").to_html()
    assert page.count("</script>") == 2 and "<\\/script>" in page


def test_jupyter_gets_a_widget_or_a_frame(explorer, monkeypatch):
    bundle = explorer._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in bundle or "iframe" in bundle["text/html"]
    monkeypatch.setattr(CacheExplorer, "widget", lambda self: (_ for _ in ()).throw(ImportError("anywidget")))
    assert "srcdoc" in explorer._repr_mimebundle_()["text/html"]


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
    chrome = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chrome or not driver:
        pytest.skip("the browser test needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with contextlib.closing(_Closing(webdriver.Chrome(options=options, service=service))) as holder:
        yield holder.driver


class _Closing:
    def __init__(self, driver):
        self.driver = driver

    def close(self):
        self.driver.quit()


def test_the_slider_shows_the_numbers_of_the_cache(browser, explorer, tmp_path):
    """The arrow keys move the slider; the numbers on the page are those of the recording, which are the cache's."""
    browser.get(explorer.save(tmp_path / "cache.html").as_uri())
    slider = browser.find_element("id", "kv-step")
    with_total = without_total = 0

    def shown(name):
        return int(browser.find_element("id", f"kv-{name}").text.replace(",", ""))

    for index, step in enumerate(explorer.recording["steps"]):
        if index:
            slider.send_keys("\ue014")  # the right arrow key
        with_total += step["multiplications"]
        without_total += step["multiplications_without"]
        assert slider.get_attribute("value") == str(index)
        assert shown("tokens-cached") == step["tokens_cached"] == len(PROMPT) + index
        assert shown("slots-written") == len(step["written"][0][0])
        assert shown("slots-read") == step["tokens_cached"]
        assert shown("bytes-used") == step["used_bytes"]
        assert shown("bytes-allocated") == explorer.recording["allocated_bytes"]
        assert (shown("mult-with-total"), shown("mult-without-total")) == (with_total, without_total)
        boxes = [box.get_attribute("data-state") for box in browser.find_elements("css selector", "[data-state]")]
        slots = len(explorer.recording["tokens"])
        assert len(boxes) == H * slots
        assert boxes.count("written") == H * step["rows"]
        assert boxes.count("empty") == H * (slots - step["tokens_cached"])
    browser.find_element("id", "kv-back").click()
    assert slider.get_attribute("value") == str(NEW - 2)
    assert browser.get_log("browser") == []
    assert json.loads(browser.execute_script("return document.getElementById('recording').textContent"))
