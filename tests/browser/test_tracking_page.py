"""The tracking page in a real browser."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

from tests.browser.browsing import SERVER_AWAY, Visitor
from tests.browser.courier import ADDRESS, AGENT, link_of, ride, send
from tests.harness import SOON_S, Fleet, Instance, token, until

GONE = re.compile("410")
UNKNOWN = re.compile("404")
STEPS = ["Order placed", "Confirmed", "Being prepared", "Asha takes care of it", "Ready", "On the way", "Delivered"]


async def live(page: Page) -> None:
    await expect(page.locator("#link")).to_have_attribute("data-state", "live")


async def shows(page: Page, position: dict[str, Any]) -> None:
    """The marker stands for this position."""
    await expect(page.locator("#marker")).to_have_attribute("data-ts", str(position["ts"]))


async def spot(page: Page) -> str:
    """Where the marker is drawn."""
    return await page.locator("#marker").get_attribute("transform") or ""


def customers_url(shop: Instance, order: dict[str, Any], ttl_s: float = 3600) -> str:
    return f"{shop.url}/track/{order['id']}#token={token('customer', 'c1', ttl_s=ttl_s)}"


async def test_guest_sees_timeline_and_moving_marker(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    link = await link_of(shop, order)
    await ride(shop, order, 0.1, 0.1, 1, age_s=60)
    page = await visitor.open(link["url"])
    await live(page)
    await expect(page).to_have_title(f"On the way · Order {order['number']}")
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"Order {order['number']}")
    await expect(page.locator("#timeline .label")).to_have_text(STEPS)
    await expect(page.locator("[aria-current=step]")).to_contain_text("On the way")
    assert await page.locator("#timeline time").count() == len(STEPS) - 1
    await expect(page.locator("#courier-name")).to_have_text("Asha")
    await expect(page.locator("#map")).to_be_visible()
    await expect(page.locator("#home")).to_be_hidden()  # a guest sees no address
    await expect(page.locator("#scale-text")).to_have_text(re.compile(r"^\d+ k?m$"))
    await expect(page.locator("#seen")).to_have_text(re.compile(r"^Last seen \d+ s ago$"))
    text = await page.locator("body").inner_text()
    assert "Kumar" not in text
    assert "KA 01" not in text
    assert "MG Road" not in text

    before = await spot(page)
    await shows(page, await ride(shop, order, 0.11, 0.2, 5))
    await expect(page.locator("#marker")).not_to_have_attribute("transform", before)
    await expect(page.locator("#trail")).to_have_attribute("points", re.compile(r"^(\S+ ){2,}\S+$"))
    assert page.url == link["url"]
    assert not [url for url in visitor.requested if not re.match(rf"(http|ws)://127\.0\.0\.1:{shop.port}/", url)]
    assert link["secret"] not in shop.log.read_text()


async def test_an_order_that_waits_for_its_payment_says_until_when(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place(paymentMethod="online")
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    about = page.locator("#about")
    await expect(about).to_have_text(re.compile(r"^Waiting for the payment until \d+:\d\d\W[ap]m\.$"))
    await shop.post(f"/orders/{order['id']}/payment-method", {"paymentMethod": "cash"})
    await expect(about).to_have_text("Waiting for the shop to confirm it.")
    await shop.post(f"/orders/{order['id']}/payment-method", {"paymentMethod": "online"})
    await expect(about).to_have_text(re.compile("^Waiting for the payment until "))
    await shop.post("/payments", {"orderId": order["id"], "provider": "razorpay"})
    await expect(about).to_have_text(re.compile("^Waiting for the payment until "))
    text = await page.locator("body").inner_text()
    assert "252" not in text, "a guest that tracks sees no amounts"


async def test_headers_on_their_way_through_the_server(shop: Instance, visitor: Visitor) -> None:
    visitor.expected.append(UNKNOWN)
    page = await visitor.page()
    response = await page.goto(f"{shop.url}/track/x")
    assert response is not None
    headers = response.headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-encoding"] == "gzip"
    await expect(page.locator("#problem")).to_be_visible()


async def test_older_position_does_not_move_the_marker(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    newest = await ride(shop, order, 0.2, 0.4, 3)
    await shows(page, newest)
    await ride(shop, order, 0.2, 0.2, 1, age_s=200)
    await shop.move(order["id"], "delivery_failed")  # comes after it on every way there is
    await expect(page.locator("#status")).to_have_text("Delivery attempt failed")
    await shows(page, newest)


async def test_customers_token_leaves_the_address_and_reaches_no_log(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop, notes="Ring twice")
    await ride(shop, order, 0.5, 0.5, 1)
    page = await visitor.open(customers_url(shop, order))
    await live(page)
    assert page.url == f"{shop.url}/track/{order['id']}"
    assert await page.evaluate("history.length") <= 2
    await expect(page.locator("#courier-name")).to_have_text("Asha Kumar")
    await expect(page.locator("#vehicle")).to_have_text("KA 01 1234")
    await expect(page.locator("#home")).to_be_visible()
    await expect(page.locator("#courier-about")).to_have_text(re.compile(r"^[\d.]+ k?m away in a straight line$"))
    await page.locator("summary").click()
    await expect(page.locator("#address")).to_have_text(f"To {ADDRESS['line1']}, {ADDRESS['city']}")
    await page.reload()  # what phones do to a page that slept; the tab remembers
    await live(page)
    assert page.url == f"{shop.url}/track/{order['id']}"
    assert not [url for url in visitor.requested if "#" not in url and "eyJ" in url]
    assert "eyJ" not in shop.log.read_text()


async def test_another_token_in_the_same_tab(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    page = await visitor.open(f"{shop.url}/track/{order['id']}")
    await expect(page.locator("#problem")).to_contain_text("Please open this page again")
    await page.goto(customers_url(shop, order))  # the same document: only the fragment differs
    await live(page)
    assert page.url == f"{shop.url}/track/{order['id']}"


async def test_somebody_elses_order(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place(customerId="c2")
    page = await visitor.open(customers_url(shop, order))
    await expect(page.locator("#problem")).to_contain_text("There is nothing to see here")
    await expect(page.locator("#page")).to_be_hidden()


async def test_status_changes_appear_live(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place()
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    await expect(page.locator("#status")).to_have_text("Order placed")
    await expect(page.locator("#rest-text")).to_have_text("The map comes when a courier has your order")
    await expect(page.locator("#announcer")).to_have_text("")  # what is there already is no news
    await shop.move(order["id"], "confirmed", "preparing")
    await expect(page.locator("#status")).to_have_text("Being prepared")
    await expect(page.locator("#announcer")).to_have_text(re.compile("Being prepared"))
    await expect(page.locator("#timeline li.next .label")).to_have_text(["Ready", "On the way", "Delivered"])
    await shop.assign(order["id"], "a1", agentName="Asha Kumar")
    await expect(page.locator("#courier-name")).to_have_text("Asha")


async def test_reassignment_takes_the_marker_away(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    await shows(page, await ride(shop, order, 0.1, 0.2, 3))
    await shop.assign(order["id"], "a2", agentName="Ravi")
    await expect(page.locator("#courier-name")).to_have_text("Ravi")
    await expect(page.locator("#map")).to_be_hidden()
    await expect(page.locator("#rest-text")).to_have_text("Waiting for the courier's position")


@pytest.mark.parametrize(("status", "words"), [("delivered", "Delivered"), ("cancelled", "Cancelled")])
async def test_end_of_the_order(shop: Instance, visitor: Visitor, status: str, words: str) -> None:
    order = await send(shop)
    link = await link_of(shop, order)
    page = await visitor.open(link["url"])
    await live(page)
    await shows(page, await ride(shop, order, 0.9, 1.0, 2))
    await shop.move(order["id"], *(["delivery_failed"] if status == "cancelled" else []), status)
    for _ in ("live", "opened later"):
        await expect(page.locator("#status")).to_have_text(words)
        await expect(page.locator("#map")).to_be_hidden()
        await expect(page.locator("#seen")).to_be_hidden()
        await expect(page.locator("#rest-text")).to_have_text(re.compile(rf"^{words}, \d"))
        await expect(page.locator("#timeline li.next")).to_have_count(0)
        await page.goto(link["url"])
        await live(page)


async def test_server_restart_on_the_same_port(fleet: Fleet, visitor: Visitor) -> None:
    visitor.expected.append(SERVER_AWAY)
    first, other = await fleet.pair()
    order = await first.place()
    page = await visitor.open((await link_of(first, order))["url"])
    await live(page)
    first.kill()
    await expect(page.locator("#link")).to_have_attribute("data-state", "reconnecting")
    await other.move(order["id"], "confirmed", "preparing")
    await other.assign(order["id"], agent_id="a1", agentName=AGENT["agentName"])
    await other.move(order["id"], "ready", "out_for_delivery")
    await fleet.start(PORT=str(first.port))
    await live(page)
    await expect(page.locator("#status")).to_have_text("On the way")
    await expect(page.locator("#timeline .label")).to_have_text(STEPS)
    await expect(page.locator("#announcer")).to_have_text(re.compile("On the way"))


async def test_draining_server_is_left_and_found_again(fleet: Fleet, visitor: Visitor) -> None:
    visitor.expected.append(SERVER_AWAY)
    first = await fleet.start()
    order = await first.place()
    page = await visitor.open((await link_of(first, order))["url"])
    await live(page)
    await first.stop()
    await expect(page.locator("#link")).to_have_attribute("data-state", "reconnecting")
    again = await fleet.start(PORT=str(first.port))
    await live(page)
    await again.move(order["id"], "confirmed")
    await expect(page.locator("#status")).to_have_text("Confirmed")


async def test_link_that_is_taken_back(shop: Instance, visitor: Visitor) -> None:
    visitor.expected.append(GONE)
    order = await send(shop)
    link = await link_of(shop, order)
    page = await visitor.open(link["url"])
    await live(page)
    assert (await shop.request("DELETE", f"/orders/{order['id']}/links/{link['id']}")).status == 204
    for _ in ("live", "opened again"):
        await expect(page.locator("#problem")).to_contain_text("This link has ended")
        await expect(page.locator("#page")).to_be_hidden()
        await expect(page.locator("#link")).to_have_attribute("data-state", "ended")
        assert order["number"] not in await page.title()
        await page.goto(link["url"])


async def test_link_that_expires(shop: Instance, visitor: Visitor) -> None:
    visitor.expected.append(GONE)
    order = await send(shop)
    link = await link_of(shop, order, ttlS=3)
    page = await visitor.open(link["url"])
    await live(page)
    for _ in ("while it is looked at", "before it is opened"):
        await expect(page.locator("#problem")).to_contain_text("This link has ended")
        await page.goto(link["url"])


@pytest.mark.parametrize("key", ["no-such-secret", "%E0%A4%A", "x" * 300])
async def test_unknown_link(shop: Instance, visitor: Visitor, key: str) -> None:
    visitor.expected += [UNKNOWN, re.compile("422")]
    page = await visitor.open(f"{shop.url}/track/{key}")
    await expect(page.locator("#problem")).to_contain_text("We do not know this link")
    await expect(page.locator("#problem")).to_contain_text("ask the shop for a new link")


async def test_guests_token_is_renewed_in_time(fleet: Fleet, visitor: Visitor) -> None:
    shop = await fleet.start(GUEST_TOKEN_TTL_S="4", TOKEN_EXPIRY_NOTICE_S="3")
    order = await shop.place()
    link = await link_of(shop, order)
    page = await visitor.page()
    sockets, sent = [], []

    def opened(socket: Any) -> None:
        sockets.append(socket)
        socket.on("framesent", lambda frame: sent.append(str(frame)))

    page.on("websocket", opened)
    await page.goto(link["url"])
    await live(page)
    began = time.monotonic()

    def renewed() -> bool:
        return len([frame for frame in sent if "refreshToken" in frame]) >= 4

    await until(renewed, "the token was renewed four times", within_s=4 * SOON_S)
    assert time.monotonic() - began > 4  # longer than one token lives
    await live(page)
    assert len(sockets) == 1, "the connection was given up"
    await shop.move(order["id"], "confirmed")
    await expect(page.locator("#status")).to_have_text("Confirmed")


async def test_guests_token_that_expired_meanwhile(fleet: Fleet, visitor: Visitor) -> None:
    visitor.expected.append(re.compile("503"))
    shop = await fleet.start(GUEST_TOKEN_TTL_S="3", TOKEN_EXPIRY_NOTICE_S="1")
    order = await shop.place()
    page = await visitor.page()
    await page.goto((await link_of(shop, order))["url"])
    await live(page)

    async def refuse(route: Route) -> None:
        await route.fulfill(status=503)

    await page.route("**/links/follow", refuse)
    await expect(page.locator("#link")).to_have_attribute("data-state", "reconnecting")
    await shop.move(order["id"], "confirmed")
    await page.unroute("**/links/follow")
    await expect(page.locator("#status")).to_have_text("Confirmed")


async def test_customers_token_that_expires(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    await ride(shop, order, 0.5, 0.5, 1)
    page = await visitor.open(customers_url(shop, order, ttl_s=5))
    await live(page)
    await expect(page.locator("#notice")).to_contain_text("open it again from your order")
    await expect(page.locator("#link")).to_have_attribute("data-state", "ended")
    await expect(page.locator("#notice")).to_contain_text("Please open this page again")
    await expect(page.locator("#status")).to_have_text("On the way")  # what was seen stays
    await expect(page.locator("#map")).to_be_hidden()  # but no position grows old there
    await page.reload()
    await expect(page.locator("#problem")).to_contain_text("Please open this page again")


async def test_old_position_says_so(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    await ride(shop, order, 0.3, 0.3, 1, age_s=200)
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    await expect(page.locator("#seen")).to_have_text("Last seen 3 min ago")
    await expect(page.locator("#map-panel")).to_have_attribute("data-stale", "true")
    await shows(page, await ride(shop, order, 0.31, 0.4, 2))
    await expect(page.locator("#map-panel")).to_have_attribute("data-stale", "false")


@pytest.mark.parametrize("skew_s", [-900, 900])
@pytest.mark.parametrize("who", ["guest", "customer"])
async def test_age_does_not_lean_on_the_viewers_clock(shop: Instance, visitor: Visitor, skew_s: int, who: str) -> None:
    order = await send(shop)
    url = (await link_of(shop, order))["url"] if who == "guest" else customers_url(shop, order)
    await ride(shop, order, 0.3, 0.3, 1, age_s=100)
    skew = f"{{ const was = Date.now; Date.now = () => was() + {skew_s * 1000}; }}"
    page = await visitor.open(url, script=skew)
    await live(page)
    await expect(page.locator("#seen")).to_have_text(re.compile(r"^Last seen 1[01]\d s ago$"))


async def test_without_websocket(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place()
    page = await visitor.open(
        (await link_of(shop, order))["url"],
        script=NO_WEBSOCKET,
    )
    await live(page)
    await shop.move(order["id"], "confirmed")
    await expect(page.locator("#status")).to_have_text("Confirmed")
    assert any("transport=polling" in url for url in visitor.requested)


async def test_offline_and_back(shop: Instance, visitor: Visitor) -> None:
    visitor.expected.append(re.compile("ERR_INTERNET_DISCONNECTED"))
    order = await shop.place()
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    await page.context.set_offline(True)
    await expect(page.locator("#link")).to_have_attribute("data-state", "offline")
    await shop.move(order["id"], "confirmed")
    await page.context.set_offline(False)
    await live(page)
    await expect(page.locator("#status")).to_have_text("Confirmed")


async def test_silent_connection_is_noticed_when_the_phone_wakes(fleet: Fleet, visitor: Visitor) -> None:
    visitor.expected.append(SERVER_AWAY)
    shop = await fleet.start()
    order = await shop.place()
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    shop.freeze()
    await page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    await expect(page.locator("#link")).to_have_attribute("data-state", "reconnecting")
    shop.thaw()
    await live(page)


async def test_reduced_motion_jumps(shop: Instance, visitor: Visitor) -> None:
    order = await send(shop)
    page = await visitor.open((await link_of(shop, order))["url"], reduced_motion="reduce")
    await live(page)
    await ride(shop, order, 0.1, 0.1, 1, age_s=200)
    await shows(page, await ride(shop, order, 0.11, 0.3, 2))
    frames = await page.evaluate(
        """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
            const at = () => document.querySelector('#marker').getAttribute('transform');
            const first = at();
            requestAnimationFrame(() => requestAnimationFrame(() => done([first, at()])));
        })))"""
    )
    assert frames[0] == frames[1]
    assert await page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
async def test_looks(shop: Instance, visitor: Visitor, width: int, scheme: str) -> None:
    """No sideways scrolling, even with long names; nothing shifts while it loads; text is readable (WCAG AA)."""
    order = await send(
        shop,
        items=[{"name": "Long" * 40, "quantity": 1, "unitPrice": 100}],
        reference="R" * 59 + scheme[0] + str(width),
    )
    await ride(shop, order, 0.3, 0.4, 3)
    page = await visitor.open(
        customers_url(shop, order), viewport={"width": width, "height": 700}, color_scheme=scheme, script=SHIFTS
    )
    await live(page)
    await page.locator("summary").click()
    await expect(page.locator("#items")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    assert await page.evaluate("window.shifted") < 0.02, await page.evaluate("window.moved")
    assert await page.evaluate(PALE) == []


async def test_for_everybody(shop: Instance, visitor: Visitor) -> None:
    """What axe would ask first."""
    order = await send(shop)
    await ride(shop, order, 0.3, 0.4, 3)
    page = await visitor.open(customers_url(shop, order))
    await live(page)
    assert await page.locator("html").get_attribute("lang") == "en"
    assert await page.locator("h1").count() == 1
    assert await page.locator("main:visible").count() == 1
    assert await page.locator("[aria-live=polite]").count() == 1
    assert await page.locator("#timeline li[aria-current=step]").count() == 1
    assert await page.evaluate("document.querySelectorAll('time:not([datetime])').length") == 0
    ids = await page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    assert await page.locator("#map").get_attribute("role") == "img"
    await expect(page.locator("#map")).to_have_attribute(
        "aria-label", re.compile("^Map: the courier, .* from the destination")
    )
    viewport = await page.locator("meta[name=viewport]").get_attribute("content") or ""
    assert "user-scalable" not in viewport
    assert "maximum-scale" not in viewport
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.tagName") == "SUMMARY"
    await page.keyboard.press("Enter")
    await expect(page.locator("#items")).to_be_visible()


async def test_without_javascript(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place()
    page = await visitor.open((await link_of(shop, order))["url"], java_script_enabled=False)
    await expect(page.locator("noscript p")).to_contain_text("needs JavaScript")
    await expect(page.locator("#page")).to_be_hidden()


async def test_policy_forbids_and_the_tests_would_hear(shop: Instance, visitor: Visitor) -> None:
    """The control of all tests here: what the policy forbids does not happen, and stands on the console."""
    order = await shop.place()
    page = await visitor.open((await link_of(shop, order))["url"])
    await live(page)
    assert not visitor.complaints
    await page.evaluate("document.head.append(Object.assign(document.createElement('style'), { textContent: 'h1{}' }))")
    await page.evaluate("fetch('https://example.invalid/').catch(() => {})")
    await page.evaluate("try { document.body.innerHTML = '<b>' } catch {}")
    await until(lambda: len(visitor.complaints) >= 3, "the console heard of it")
    visitor.expected.append(re.compile("Content Security Policy|requires 'TrustedHTML'"))


NO_WEBSOCKET = """
window.WebSocket = class { constructor() { setTimeout(() => this.onerror(new Event("error"))); } close() {} };
"""
"""A network that lets no WebSocket through."""

SHIFTS = """
window.shifted = 0;
window.moved = [];
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) {
    window.shifted += one.value;
    for (const { node } of one.sources) window.moved.push(`${node && (node.id || node.className)} ${one.value}`);
  }
}).observe({ type: "layout-shift", buffered: true });
"""
"""Adds up what moved without anybody having asked for it."""

PALE = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || one.closest("svg, noscript, .unseen") || !one.checkVisibility()) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(parse(style.color)), light(ground(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) pale.push(`${one.tagName}#${one.id}.${one.className} ${ratio.toFixed(2)}`);
  }
  return pale;
}"""
"""Texts whose contrast with their ground is less than WCAG AA asks for."""
