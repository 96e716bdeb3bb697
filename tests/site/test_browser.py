"""The pages in a real browser: by keyboard, in both themes, on a phone, without JavaScript, and opened from disk."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect
from tests.site.conftest import CLAIM

from assay.site.export import export

KINDS = {
    "list": "/", "paper": "/papers/xattention", "planned": "/papers/swin", "compare": "/compare",
    "chosen": "/compare?paper=xattention&machine=mine&older=1", "recipes": "/recipes", "recipe": "/recipes/{run}", "machines": "/machines",
    "machine": "/machines/mine", "audit": "/audit", "guide": "/guide",
    "text": "/guide/measuring", "command": "/guide/command-tune", "missing": "/papers/nope",
}  # fmt: skip

COLOURS = {
    "resultTypes": ["violations"],
    "runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]},
}


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    opened.trouble = []
    opened.on("pageerror", lambda error: opened.trouble.append(str(error)))
    opened.on(
        "console",
        lambda said: opened.trouble.append(said.text) if said.type == "error" and "404" not in said.text else None,
    )
    yield opened
    assert opened.trouble == []
    context.close()


def test_everybody_can_use_every_kind_of_page(browser, address, shelf):
    """axe-core's rules for WCAG 2.2 AA, and no page wider than a phone. Another scheme changes colours, and nothing else."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme="light")
    opened = context.new_page()
    run = next(iter(shelf.library().tuned))
    for name, kind in KINDS.items():
        path = kind.format(run=run)
        for width in (360, 768, 1440):
            opened.set_viewport_size({"width": width, "height": 900})
            opened.goto(address + path)
            assert opened.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
        for scheme, rules in (("light", {"resultTypes": ["violations"]}), ("dark", COLOURS)):
            opened.emulate_media(color_scheme=scheme)
            found = Axe().run(opened, options=rules).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found] == [], (name, scheme)
        opened.emulate_media(color_scheme="light")
    context.close()


def test_search_filter_open_and_go_back(page, address):
    page.goto(address)
    assert "138 papers" in page.locator(".found").inner_text()
    page.get_by_label("Search by meaning").fill("kolmogorov-arnold")
    expect(page.locator(".paper h2").first).to_contain_text("Kolmogorov")
    assert re.search(r"\?q=kolmogorov-arnold", page.url)
    page.get_by_label("Search by meaning").fill("")
    page.locator("#verdict").select_option("reproduced")
    page.wait_for_url("**verdict=reproduced**")
    expect(page.locator(".paper[data-family]")).to_have_count(1)
    kept = page.url
    page.locator(".paper h2 a").first.click()
    page.wait_for_url("**/papers/xattention")
    expect(page.locator(".seen .chip").first).to_have_text("reproduced")
    page.get_by_role("link", name="what is free").click()
    page.wait_for_url("**against=free")
    assert "gain over what is free" in page.locator(".bar title").first.text_content()
    page.goto(kept)
    assert page.locator(".paper[data-family]").count() == 1


def test_by_keyboard_alone(page, address):
    page.goto(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", seen
    assert {"q", "family", "saves", "verdict"} <= set(seen)
    page.locator("#q").focus()
    page.keyboard.type("swin")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=swin*")


def test_without_javascript(browser, address):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(address)
    opened.get_by_label("Family").select_option("mixers")
    opened.get_by_role("button", name="Show").click()
    assert "family=mixers" in opened.url
    assert opened.locator(".paper[data-family]").count() == 4
    opened.goto(address + "/compare")
    assert opened.locator("svg.pareto").count() == 1
    context.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_audit_a_pasted_figure(browser, address, scripts):
    """The browser says that the form is from here; the answer is fit for everybody too."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        context = browser.new_context(java_script_enabled=scripts, color_scheme=scheme)
        opened = context.new_page()
        opened.set_viewport_size({"width": 360, "height": 900})
        opened.goto(address)
        opened.get_by_role("link", name="Audit").click()
        opened.get_by_label("Samples").fill("label,value\n" + "old,2\n" * 12 + "new,1\n" * 12)
        opened.get_by_role("button", name="Audit").click()
        expect(opened.locator("#verdict")).to_have_text("a difference")
        expect(opened.get_by_text("interleaved")).to_have_count(1)
        assert opened.get_by_label("Samples").input_value().startswith("label,value\nold,2")
        if scripts:
            assert opened.evaluate("document.documentElement.scrollWidth") <= 360
            found = Axe().run(opened).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found] == []
        opened.get_by_label("Samples").fill("before,after\n1,0\n")
        opened.get_by_role("button", name="Audit").click()
        expect(opened.get_by_role("alert")).to_contain_text("value 1 is 0")
        context.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_choose_papers_recipes_and_machines_by_keyboard(browser, address, scripts):
    """What is ticked stands in the address, and an address ticks it again."""
    context = browser.new_context(java_script_enabled=scripts, viewport={"width": 360, "height": 800})
    opened = context.new_page()
    opened.goto(address + "/compare")
    assert opened.locator("svg.pareto circle").count() == 3
    assert opened.locator("svg.pareto rect").count() == 2
    for legend, label in (("Machines", "My CPU"), ("Papers", "xattention"), ("Recipes", "ttft")):
        summary = opened.locator("summary", has_text=legend)
        summary.focus()
        opened.keyboard.press("Enter")
        box = opened.locator("label.choice", has_text=label).locator("input").first
        box.focus()
        opened.keyboard.press("Space")
        expect(box).to_be_checked()
    opened.get_by_label("Gain over", exact=True).select_option("paper")
    opened.get_by_role("button", name="Show").press("Enter")
    opened.wait_for_url("**machine=mine**")
    assert "paper=xattention" in opened.url
    assert "recipe=" in opened.url
    assert opened.locator("svg.pareto circle").count() == opened.locator("svg.pareto rect").count() == 1
    expect(opened.locator("details[open] input:checked")).to_have_count(3)
    opened.get_by_role("link", name="Clear").click()
    assert opened.locator("svg.pareto circle").count() == 3
    context.close()


def test_a_paper_shows_what_it_was_measured_with(page, address):
    page.goto(address + "/papers/xattention#combines")
    pair = page.locator("table", has_text="product of the two").locator("tbody tr").first
    expect(pair).to_contain_text("4x")
    expect(pair).to_contain_text("3.2x")
    pair.get_by_role("link", name="fp8_vs_int8").click()
    page.wait_for_url("**/papers/fp8_vs_int8")
    page.locator("#combines ~ .scroll").get_by_role("link", name="ttft").first.click()
    page.wait_for_url("**/recipes/*")
    expect(page.get_by_role("heading", level=1)).to_have_text("dtype + fp8_vs_int8 + xattention")


@pytest.mark.slow
def test_an_export_opened_from_disk(page, shelf, tmp_path):
    export(shelf.library(), tmp_path / "site")
    page.goto((tmp_path / "site" / "index.html").as_uri())
    expect(page.locator(".paper[data-family]:visible")).to_have_count(138)
    page.get_by_label("Search by words").fill("kolmogorov")
    expect(page.locator(".paper[data-family]:visible")).to_have_count(1)
    assert page.url.endswith("#q=kolmogorov")
    page.get_by_role("link", name="Clear").click()
    expect(page.locator(".paper[data-family]:visible")).to_have_count(138)
    page.locator("#verdict").select_option("reproduced")
    expect(page.locator(".paper[data-family]:visible")).to_have_count(1)
    page.locator(".paper h2 a:visible").click()
    page.wait_for_url("**/papers/xattention.html")
    assert page.locator(f"#{CLAIM.split('/')[1]}").count() == 1
    page.get_by_role("link", name="Compare").click()
    page.wait_for_url("**/compare.html")
    assert page.locator("svg.pareto circle").count() == 3
    assert page.locator("svg.pareto rect").count() == 2
    page.locator("td a", has_text="dtype + fp8_vs_int8 + xattention").click()
    page.wait_for_url("**/recipes/*.html")
    page.locator("td a", has_text="xattention").first.click()
    page.wait_for_url("**/papers/xattention.html")
