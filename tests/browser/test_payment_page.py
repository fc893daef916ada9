"""A person pays in a real browser: from a payment link, at the simulators' pages, and back."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

from server.adapters.sandbox.razorpay import RazorpaySandbox
from server.adapters.sandbox.stripe import StripeSandbox
from server.embedded import DataServers
from tests.browser.browsing import Visitor
from tests.harness import Instance, token, until
from tests.shared import ask_simulator, shared_fleet

PROVIDERS = ("razorpay", "stripe")
ITEMS = [{"name": "Masala dosa", "quantity": 2, "unitPrice": 12000, "taxRateBp": 500}]
LATE_S = 2
"""How long the bank of a test takes to change its mind."""

GONE, UNKNOWN = re.compile("410"), re.compile("404")


class Bill:
    """An order that waits for its money, and a link to pay it."""

    def __init__(self, shop: Instance, order: dict[str, Any], link: dict[str, Any]) -> None:
        self.shop, self.order, self.id = shop, order, order["id"]
        self.link_id: str = link["id"]
        self.secret: str = link["url"].rpartition("/")[2]
        self.url = f"{shop.url}/pay/{self.secret}"

    async def now(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.shop.get(f"/orders/{self.id}")).body
        return found

    async def payments(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.shop.get(f"/payments?orderId={self.id}")).body["items"]
        return found


async def bill(shop: Instance, **changes: Any) -> Bill:
    order = await shop.place(**{"paymentMethod": "online", "items": ITEMS, **changes})
    reply = await shop.post(f"/orders/{order['id']}/payment-link", {})
    assert reply.status == 201, reply
    return Bill(shop, order, reply.body)


async def stands(page: Page, *states: str) -> None:
    """The payment page is about one of these: due, waiting, failed, paid or closed."""
    await expect(page.locator("#page")).to_have_attribute("data-state", re.compile(f"^({'|'.join(states)})$"))
    await expect(page.locator("#page")).to_have_attribute("aria-busy", "false")


async def choose(page: Page, provider: str) -> None:
    """Go to the gateway's page."""
    await page.locator(f"[data-provider={provider}]").click()
    await expect(page.locator(".note")).to_contain_text("Simulator: no money moves.")


async def act(page: Page, action: str) -> None:
    await page.locator(f"[data-action={action}]").click()


# every way that it ends


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_person_pays(shop: Instance, visitor: Visitor, provider: str) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await stands(page, "due")
    await expect(page).to_have_title(f"To pay: ₹252.00 · Order {due.order['number']}")
    await expect(page.locator("#state")).to_have_text("To pay: ₹252.00")
    await expect(page.locator("#until")).to_have_text(
        re.compile(r"^The shop keeps your order until \d+:\d\d\W[ap]m\.$")
    )
    await expect(page.locator("#items")).to_have_text("2 × Masala dosa₹240.00")
    await expect(page.locator("#totals")).to_have_text("Tax₹12.00Total₹252.00")
    await expect(page.locator(f"[data-provider={provider}]")).to_contain_text("Simulator: no money moves")
    await choose(page, provider)
    await expect(page.locator("#amount")).to_have_text("₹252.00")
    await act(page, "pay")
    await stands(page, "paid")
    await expect(page.locator("#state")).to_have_text("Paid")
    await expect(page.locator("#about")).to_have_text("₹252.00 arrived. Thank you.")
    await expect(page.locator(".choice:visible")).to_have_count(0)
    after = await due.now()
    assert (after["status"], after["payment"]["status"], after["payment"]["paid"]) == ("confirmed", "paid", 25_200)
    assert page.url == due.url, "the address is the link again"
    told_elsewhere = [url for url in visitor.requested if due.secret in url and not url.startswith(shop.url)]
    assert told_elsewhere == [], "the gateway never learns the link's secret"
    assert due.secret not in shop.log.read_text()
    await page.get_by_role("link", name="Follow your order").click()
    await expect(page.locator("#status")).to_have_text("Confirmed")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_person_fails_then_pays(shop: Instance, visitor: Visitor, provider: str) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, provider)
    await act(page, "fail")
    await expect(page.locator("#result")).not_to_be_empty()
    await page.get_by_role("link", name="Back to the shop").click()
    await stands(page, "failed")
    await expect(page.locator("#state")).to_have_text("The payment did not work")
    await expect(page.locator("#about")).to_contain_text(re.compile(r"\w\. You can try again: ₹252\.00\."))
    assert (await due.now())["status"] == "pending"
    other = next(one for one in PROVIDERS if one != provider)
    await expect(page.locator(f"[data-provider={other}]")).to_be_visible()
    await choose(page, provider)
    await act(page, "pay")
    await stands(page, "paid")
    assert (await due.now())["payment"]["paid"] == 25_200


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_person_cancels_and_pays_another_way(shop: Instance, visitor: Visitor, provider: str) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, provider)
    await act(page, "cancel")
    await stands(page, "due", "failed")
    after = await due.now()
    assert (after["status"], after["payment"]["paid"]) == ("pending", 0)
    await choose(page, next(one for one in PROVIDERS if one != provider))
    await act(page, "pay")
    await stands(page, "paid")
    assert [one["status"] for one in await due.payments() if one["captured"]] == ["completed"]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_person_pays_late_and_the_page_shows_it_by_itself(
    shop: Instance, visitor: Visitor, provider: str
) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)

    async def sooner(route: Route) -> None:
        await route.continue_(post_data=json.dumps({"method": "upi", "afterS": LATE_S}))

    if provider == "razorpay":
        await page.route("**/pay_late", sooner)
    await choose(page, provider)
    await act(page, "pay_late")
    if provider == "razorpay":
        await expect(page.locator("#result")).to_contain_text("The bank says no for now.")
        await page.get_by_role("link", name="Back to the shop").click()
    await expect(page.locator("#state")).to_have_text("Paid")
    after = await due.now()
    assert (after["status"], after["payment"]["paid"]) == ("confirmed", 25_200)


async def test_money_for_an_order_that_was_cancelled_meanwhile_goes_back(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, "razorpay")
    await cancel(due)
    await act(page, "pay")
    await stands(page, "closed")
    await expect(page.locator("#about")).to_have_text("The kitchen is closed. ₹252.00 went back the way it came.")
    after = await due.now()
    assert (after["status"], after["payment"]["refunded"]) == ("cancelled", 25_200)


async def test_what_can_be_cancelled_at_the_gateway_is_paid_by_nobody(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, "stripe")
    await cancel(due)

    async def ended() -> bool:
        return [one["status"] for one in await due.payments()] == ["cancelled"]

    await until(ended, "the intent was cancelled too")
    visitor.expected.append(re.compile("400"))
    await act(page, "pay")
    await expect(page.locator("#result")).not_to_be_empty()
    await page.get_by_role("link", name="Back to the shop").click()
    await stands(page, "closed")
    await expect(page.locator("#about")).to_have_text("The kitchen is closed.")


async def cancel(due: Bill) -> None:
    reply = await due.shop.post(f"/orders/{due.id}/cancel", {"reason": "The kitchen is closed."})
    assert reply.status == 200, reply


async def test_a_card_that_the_bank_asks_about(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, "stripe")
    await act(page, "secure")
    await act(page, "refuse")
    await stands(page, "due", "failed")
    await choose(page, "stripe")
    await act(page, "secure")
    await act(page, "approve")
    await stands(page, "paid")


async def test_money_that_comes_elsewhere_is_shown_without_a_reload(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await stands(page, "due")
    other = await visitor.open(due.url)
    await choose(other, "razorpay")
    await act(other, "pay")
    await stands(other, "paid")
    await stands(page, "paid")
    await expect(page.locator("#announcer")).to_contain_text("Paid.")
    assert await page.evaluate("document.activeElement.id") == "state"


# who comes how


async def test_a_customer_pays_with_a_token_of_the_merchants(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(f"{shop.url}/pay/{due.id}#token={token('customer', 'c1')}")
    await stands(page, "due")
    assert page.url == f"{shop.url}/pay/{due.id}", "the token does not stay in the address bar"
    await choose(page, "razorpay")
    await act(page, "pay")
    await stands(page, "paid")


async def test_a_page_that_is_reloaded_or_gone_back_to_is_the_same(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, "stripe")
    await page.go_back()
    await stands(page, "due")
    await expect(page.locator("[data-provider=stripe]")).to_be_enabled()
    await page.reload()
    await stands(page, "due")
    assert page.url == due.url


async def test_who_comes_back_in_another_browser_is_asked_for_the_link(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(f"{shop.url}/pay/{due.id}?razorpay_payment_id=pay_1&razorpay_order_id=order_1")
    await expect(page.locator("#problem-title")).to_have_text("Please open the payment link again")


async def test_a_tracking_link_opens_the_tracking_page(shop: Instance, visitor: Visitor) -> None:
    order = await shop.place()
    made = (await shop.post(f"/orders/{order['id']}/tracking-link", {})).body
    page = await visitor.open(f"{shop.url}/pay/{made['url'].rpartition('/')[2]}")
    await expect(page.locator("#status")).to_have_text("Order placed")
    assert "/track/" in page.url


async def test_links_that_open_nothing(shop: Instance, visitor: Visitor) -> None:
    visitor.expected += [GONE, UNKNOWN]
    page = await visitor.open(f"{shop.url}/pay/no-such-secret")
    await expect(page.locator("#problem-title")).to_have_text("We do not know this link")
    due = await bill(shop)
    link = (await shop.post(f"/orders/{due.id}/payment-link", {})).body
    await shop.request("DELETE", f"/orders/{due.id}/links/{link['id']}")
    page = await visitor.open(f"{shop.url}/pay/{link['url'].rpartition('/')[2]}")
    await expect(page.locator("#problem-title")).to_have_text("This link has ended")


async def test_a_page_whose_link_ends_says_so(shop: Instance, visitor: Visitor) -> None:
    visitor.expected += [GONE, re.compile("401")]
    due = await bill(shop)
    page = await visitor.open(due.url)
    await stands(page, "due")
    reply = await shop.request("DELETE", f"/orders/{due.id}/links/{due.link_id}")
    assert reply.status == 204, reply
    await cancel(due)  # ends the long poll
    await expect(page.locator("#problem-title")).to_have_text("This link has ended")


@pytest.mark.parametrize("forged", ["", "0" * 64])
async def test_an_address_that_claims_a_payment_proves_nothing(shop: Instance, visitor: Visitor, forged: str) -> None:
    visitor.expected.append(re.compile("422"))
    due = await bill(shop)
    page = await visitor.open(due.url)
    await choose(page, "razorpay")
    (payment,) = await due.payments()
    name = payment["gatewayOrderId"]
    await page.goto(
        f"{due.url}?razorpay_payment_id=pay_00000000000000&razorpay_order_id={name}&razorpay_signature={forged}"
    )
    await stands(page, "due")
    if forged:
        await expect(page.locator("#notice")).to_be_visible()
    assert (await due.now())["payment"]["paid"] == 0


async def test_it_fits_a_narrow_screen_and_a_thumb(shop: Instance, visitor: Visitor) -> None:
    due = await bill(
        shop,
        items=[{"name": "Donaudampfschifffahrtsgesellschaftskapitän" * 2, "quantity": 1000, "unitPrice": 99_999_999}],
    )
    page = await visitor.open(due.url, viewport={"width": 320, "height": 640})
    await stands(page, "due")
    for at in ("the shop's page", "the simulator's page"):
        assert await page.evaluate("document.documentElement.scrollWidth") <= 320
        for button in await page.locator("button:visible").all():
            box = await button.bounding_box()
            assert box is not None
            assert box["height"] >= 44
        if at == "the shop's page":
            await choose(page, "razorpay")


async def test_a_keyboard_is_enough(shop: Instance, visitor: Visitor) -> None:
    due = await bill(shop)
    page = await visitor.open(due.url)
    await stands(page, "due")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.dataset.provider") == "razorpay"
    await page.keyboard.press("Enter")
    await expect(page.locator(".note")).to_contain_text("Simulator")


async def test_a_gateway_that_is_away_is_said_to_be(shop: Instance, visitor: Visitor) -> None:
    visitor.expected.append(re.compile("50[23]"))
    due = await bill(shop)
    page = await visitor.open(due.url)
    await page.route(
        "**/api/v1/payments",
        lambda route: route.fulfill(
            status=502,
            content_type="application/problem+json",
            body=json.dumps({"code": "gateway_error", "detail": "x"}),
        ),
    )
    await page.locator("[data-provider=razorpay]").click()
    await expect(page.locator("#notice")).to_contain_text("Razorpay did not answer. Nothing was paid yet.")
    await stands(page, "due")


@pytest.fixture(scope="module")
async def hurried(data: DataServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Instance]:
    """A shop that does not wait long for a gateway."""
    async with shared_fleet(data, tmp_path_factory.mktemp("hurried")) as fleet:
        yield await fleet.start(GATEWAY_TIMEOUT_MS="1000")


async def test_a_gateway_that_hangs_is_said_to(hurried: Instance, visitor: Visitor) -> None:
    due = await bill(hurried)
    page = await visitor.open(due.url)
    await stands(page, "due")
    listening = [one for one in hurried.log_records() if one["event"] == "sandbox_listening"]
    (simulator,) = (one["url"] for one in listening if one["provider"] == "razorpay")
    await ask_simulator(simulator, "/mischief", {"fault": "hang", "faultCalls": 100})
    await page.locator("[data-provider=razorpay]").click()
    await expect(page.locator("#notice")).to_have_text(
        "Razorpay did not answer. Nothing was paid yet. Try again, or choose another way."
    )
    await stands(page, "due")
    assert [one["status"] for one in await due.payments()] == ["unknown"]
    await choose(page, "stripe")
    await act(page, "pay")
    await stands(page, "paid")
    await expect(page.locator("#notice")).to_be_hidden()


# with keys: the gateway's own checkout opens inside the page

KEYS = {
    "RAZORPAY_KEY_ID": "rzp_test_0123456789abcd",
    "RAZORPAY_KEY_SECRET": "razorpay-secret",
    "RAZORPAY_WEBHOOK_SECRET": "razorpay-webhooks",
    "STRIPE_SECRET_KEY": "sk_test_0123456789",
    "STRIPE_PUBLISHABLE_KEY": "pk_test_0123456789",
    "STRIPE_WEBHOOK_SECRET": "whsec_0123456789",
}

RAZORPAY_JS = """
window.Razorpay = class {
  constructor(options) { this.options = options; }
  open() {
    const frame = document.createElement("iframe");
    frame.src = "https://api.razorpay.com/v1/checkout/public";
    frame.onload = async () => {
      frame.remove();
      const answer = await atGateway("razorpay", this.options.order_id, this.options.key);
      if (answer) this.options.handler(answer);
      else this.options.modal.ondismiss();
    };
    document.body.append(frame);
  }
};
"""
STRIPE_JS = """
window.Stripe = (key) => ({
  elements: ({ clientSecret }) => ({
    clientSecret,
    create: () => ({
      mount: (place) => {
        const frame = document.createElement("iframe");
        frame.src = "https://js.stripe.com/v3/elements-inner-payment.html";
        document.querySelector(place).append(frame);
      },
    }),
  }),
  confirmPayment: async ({ elements }) => {
    const answer = await atGateway("stripe", elements.clientSecret.split("_secret_")[0], key);
    return answer ? { paymentIntent: answer } : { error: { message: "Your card was declined." } };
  },
});
"""
"""What stands for the gateways' scripts here, at their own addresses: all that the page may rely on."""


class Gateways:
    """Both simulators, run by the test: the server under test calls them as it calls the real ones."""

    def __init__(self) -> None:
        self.razorpay = RazorpaySandbox(
            KEYS["RAZORPAY_KEY_ID"], KEYS["RAZORPAY_KEY_SECRET"], KEYS["RAZORPAY_WEBHOOK_SECRET"]
        )
        self.stripe = StripeSandbox(
            KEYS["STRIPE_SECRET_KEY"], KEYS["STRIPE_PUBLISHABLE_KEY"], KEYS["STRIPE_WEBHOOK_SECRET"]
        )
        self.outcomes = ["yes"]
        """What the payer's bank says next; the last one goes on."""

    async def serve_scripts(self, page: Page) -> None:
        """Let the gateways' hosts answer in this page, and its scripts reach the bank."""

        async def answer(route: Route) -> None:
            url = route.request.url
            body = RAZORPAY_JS if "checkout.js" in url else STRIPE_JS if url.endswith("/v3/") else "<p>Card</p>"
            kind = "text/html" if body.startswith("<") else "text/javascript"
            await route.fulfill(body=body, content_type=kind)

        await page.route(re.compile(r"^https://[^/]+\.(razorpay|stripe)\.com/"), answer)
        await page.expose_function("atGateway", self._bank)

    def _bank(self, provider: str, name: str, key: str) -> Any:
        assert key in KEYS.values()
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if provider == "razorpay":
            return self.razorpay.pay(name) if outcome == "yes" else None
        if outcome == "yes":
            return {"status": self.stripe.books.pay(name)["status"]}
        self.stripe.books.pay(name, "pm_card_chargeDeclined")
        return None


@pytest.fixture(scope="module")
async def gateways() -> AsyncIterator[Gateways]:
    made = Gateways()
    await made.razorpay.start()
    await made.stripe.start()
    yield made
    await made.razorpay.stop()
    await made.stripe.stop()


@pytest.fixture(scope="module")
async def keyed(
    data: DataServers, gateways: Gateways, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Instance]:
    """A shop with keys of both gateways."""
    urls = {"RAZORPAY_API_URL": gateways.razorpay.url, "STRIPE_API_URL": gateways.stripe.url}
    async with shared_fleet(data, tmp_path_factory.mktemp("keyed")) as fleet:
        yield await fleet.start("all", ready=True, **KEYS, **urls)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_with_keys_a_person_pays_at_the_gateways_own_checkout(
    keyed: Instance, gateways: Gateways, visitor: Visitor, provider: str
) -> None:
    due = await bill(keyed)
    page = await visitor.page()
    await gateways.serve_scripts(page)
    await page.goto(due.url)
    await stands(page, "due")
    assert "Simulator" not in await page.locator("body").inner_text()
    gateways.outcomes[:] = ["no", "yes"]
    await page.locator(f"[data-provider={provider}]").click()
    if provider == "stripe":
        await expect(page.locator("#card-pay")).to_have_text("Pay ₹252.00")
        await page.locator("#card-submit").click()
        await expect(page.locator("#notice")).to_have_text("Your card was declined.")
        await stands(page, "due", "failed")
        if await page.locator("#card-submit").is_visible():
            await page.locator("#card-submit").click()
        else:
            await page.locator("[data-provider=stripe]").click()
            await page.locator("#card-submit").click()
    else:
        await stands(page, "due")  # the checkout was closed
        await page.locator("[data-provider=razorpay]").click()
    await stands(page, "paid")
    assert (await due.now())["payment"]["paid"] == 25_200
    gateways_hosts = {url.split("/")[2] for url in visitor.requested if url.startswith("https://")}
    assert all(host.endswith(f"{provider}.com") for host in gateways_hosts), gateways_hosts
    assert not [url for url in visitor.requested if due.secret in url and not url.startswith(keyed.url)]


async def test_with_keys_a_script_that_does_not_load_costs_nothing(keyed: Instance, visitor: Visitor) -> None:
    visitor.expected.append(re.compile("ERR_FAILED"))
    due = await bill(keyed)
    page = await visitor.page()
    await page.route(re.compile(r"^https://"), lambda route: route.abort())
    await page.goto(due.url)
    await page.locator("[data-provider=razorpay]").click()
    await expect(page.locator("#notice")).to_contain_text("did not load")
    await stands(page, "due")
