// The payment page: shows what an order costs, lets a person pay it at a gateway, and follows what becomes of it.
"use strict";
(() => {
  const RETRY_MS = 500;
  const RETRY_MAX_MS = 8_000;
  const TRIES_MAX = 6; // a person waits for a click about so long
  const WAIT_S = 25; // one long poll
  const OFFERS_MS = 10_000; // how soon a gateway that was away may be back

  const GATEWAYS = {
    razorpay: ["Razorpay", "UPI, cards, netbanking, wallets"],
    stripe: ["Stripe", "Cards and more"],
  };
  const nameOf = (provider) => (GATEWAYS[provider] || [provider])[0];
  const SCRIPTS = { razorpay: "https://checkout.razorpay.com/v1/checkout.js", stripe: "https://js.stripe.com/v3/" };
  const MOVING = ["processing", "authorized", "unknown"];
  const ENDS = {
    ended: ["This link has ended", "Links to pay an order work for a while only. Please ask the shop for a new one."],
    unknown: ["We do not know this link", "Please check that the address is complete, or ask the shop for a new link."],
    closed: ["Please open the payment link again", "If you have just paid, nothing is lost: your link shows what became of it."],
    away: ["The shop does not answer", "Nothing was lost. Please load this page again in a moment."],
    missing: ["There is nothing to pay here", "We found no such order for you. Please ask the shop for a new link."],
  };
  // minor units of these currencies are not hundredths (ISO 4217); browsers disagree with it about some
  const EXPONENTS = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
  };

  const $ = (id) => document.getElementById(id);
  const say = (id, text) => {
    if ($(id).textContent !== text) $(id).textContent = text;
  };
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  };

  // where we are

  const [, base, key] = /^(.*)\/pay\/([^/]*)$/.exec(location.pathname) || [null, "", ""];
  const isOrder = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(key);
  const back = new URLSearchParams(location.search); // what a gateway has to say when it sends somebody back
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);

  // access

  class Over extends Error {}
  class Refused extends Error {
    constructor(status, problem) {
      super(problem.detail || "This did not work.");
      this.status = status;
      this.code = problem.code || "";
    }
  }

  let secret = isOrder ? "" : key;
  let token = "";
  let orderId = isOrder ? key.toLowerCase() : "";

  const pause = (ms) =>
    new Promise((resolve) => {
      setTimeout(resolve, ms);
      addEventListener("online", resolve, { once: true });
    });
  const backoff = (failures) => Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** failures) * (0.5 + Math.random());

  // A gateway never learns the link's secret: people come back to the order's own address, and this tab remembers.
  const slot = (what) => `waybill:${what}${orderId}`;
  function remember(what, value) {
    try {
      if (value) sessionStorage.setItem(slot(what), value);
      return sessionStorage.getItem(slot(what)) || "";
    } catch {
      return value;
    }
  }

  /** Who comes to the order's address brings a customer's token in the fragment, or was here before in this tab. */
  function recall() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token") || "";
    secret = given ? "" : remember("pay:", "");
    token = secret ? "" : remember("", given);
    history.replaceState(null, "", `${base}/pay/${secret || key}`);
    if (!secret && !token) throw new Over("closed");
  }

  /** Exchange the link's secret for a token. Throws Over when it opens nothing (any more). */
  async function follow() {
    try {
      const grant = await send("POST", "/links/follow", { secret: decodeURIComponent(secret) });
      if (grant.scope !== "pay") {
        location.replace(`${base}/track/${secret}`);
        return false;
      }
      ({ token, orderId } = grant);
      remember("pay:", secret);
      return true;
    } catch (error) {
      if (error instanceof URIError || (error instanceof Refused && error.status < 500)) throw new Over(error.status === 410 ? "ended" : "unknown");
      throw error;
    }
  }

  /** One request, tried again while nobody answers. Throws Refused with what the server says. */
  async function send(method, path, body, { tries = TRIES_MAX, timeoutMs = 20_000 } = {}) {
    for (let failures = 0; ; failures++) {
      let wait = backoff(failures);
      try {
        const response = await fetch(`${base}/api/v1${path}`, {
          method,
          headers: { ...(token && { Authorization: `Bearer ${token}` }), ...(body && { "Content-Type": "application/json" }) },
          body: body && JSON.stringify(body),
          signal: AbortSignal.timeout(timeoutMs),
        });
        const answer = response.status === 204 ? {} : await response.json();
        if (response.ok) return answer;
        const refused = new Refused(response.status, answer);
        const forNow = response.status === 429 || (response.status === 503 && answer.code === "unavailable");
        if (!forNow || failures + 1 >= tries) throw refused;
        wait = Math.max(wait, 1000 * response.headers.get("Retry-After") || 0);
      } catch (error) {
        if (error instanceof Refused) throw error;
        if (failures + 1 >= tries) throw new Refused(0, { detail: "The shop cannot be reached. Please check your connection and try again." });
      }
      await pause(wait);
    }
  }

  /** The same as the bearer of the token; one that has expired is exchanged anew. */
  async function call(method, path, body, how) {
    try {
      return await send(method, path, body, how);
    } catch (error) {
      if (error.status !== 401) throw error;
      if (!secret) throw new Over("closed");
      await follow();
      return send(method, path, body, how);
    }
  }

  function finish(why) {
    const [title, text] = ENDS[why] || ENDS.unknown;
    for (const id of ["page", "notice"]) $(id).hidden = true;
    document.title = title;
    say("title", "Payment");
    say("problem-title", title);
    say("problem-text", text);
    $("problem").hidden = false;
  }

  // what we know

  let order = null;
  let payments = []; // newest first
  let offers = null;
  let busy = "";
  let shown = "";

  async function refresh() {
    const [found, list] = await Promise.all([
      call("GET", `/orders/${orderId}`),
      call("GET", `/payments?orderId=${orderId}`),
    ]);
    order = found;
    payments = list.items;
    if (standing() !== "paid" && !offers) await askOffers();
    render();
  }

  async function askOffers() {
    offers = (await call("GET", "/payments/providers")).items;
    if (!offers.length) setTimeout(() => askOffers().then(render, stumble), OFFERS_MS);
  }

  /** Nobody knows whether the gateway has it; nobody can have paid it, because no checkout was shown. */
  const uncertain = (payment) => payment.status === "unknown" && !payment.gatewayOrderId;

  /** due, waiting, failed, paid or closed: what the page is about. */
  function standing() {
    const { payment, status } = order;
    if (busy) return "waiting";
    if (status === "cancelled") return "closed";
    if (payment.due <= 0) return "paid";
    if (payments.some((one) => MOVING.includes(one.status) && !uncertain(one))) return "waiting";
    return payments.length && payments[0].status === "failed" ? "failed" : "due";
  }

  /** Follow the order's events; each of them may change what is to be paid. */
  async function live() {
    for (;;) {
      try {
        const path = `/orders/${orderId}/events?after=${order.seq}&wait=${WAIT_S}`;
        const told = await call("GET", path, undefined, { timeoutMs: (WAIT_S + 20) * 1000 });
        if (told.events.length) await refresh();
      } catch (error) {
        if (error instanceof Over || error.status === 404) throw error;
        await pause(RETRY_MAX_MS);
      }
    }
  }

  // paying

  async function pay(provider) {
    quiet();
    await working("One moment", async () => {
      const returnUrl = `${location.origin}${base}/pay/${orderId}`;
      const silent = `${nameOf(provider)} did not answer. Nothing was paid yet. Try again, or choose another way.`;
      const payment = await call("POST", "/payments", { orderId, provider, returnUrl }).catch((error) => {
        throw error.status === 502 || error.status === 503 ? new Refused(0, { detail: silent }) : error;
      });
      const { checkout } = payment;
      if (!checkout) {
        if (uncertain(payment)) notify(silent);
        return; // else its status says what becomes of it
      }
      if (checkout.url) await goTo(checkout.url, returnUrl);
      else if (provider === "razorpay") await payAtRazorpay(payment, checkout);
      else await payAtStripe(payment, checkout, returnUrl);
    });
  }

  function goTo(url, returnUrl) {
    const there = new URL(url, location.href);
    if (!["http:", "https:"].includes(there.protocol)) throw new Refused(0, { detail: "This gateway cannot be opened." });
    there.searchParams.set("returnUrl", returnUrl);
    location.assign(there);
    return new Promise(() => {}); // this page is left
  }

  async function payAtRazorpay(payment, checkout) {
    await load(SCRIPTS.razorpay);
    const answer = await new Promise((resolve) => {
      new window.Razorpay({
        key: checkout.keyId,
        order_id: checkout.gatewayOrderId,
        amount: checkout.amount,
        currency: checkout.currency,
        description: `Order ${order.number}`,
        prefill: checkout.prefill,
        handler: resolve,
        modal: { ondismiss: () => resolve(null) },
      }).open();
    });
    if (answer) await verify(payment, proof((name) => answer[name]));
  }

  async function payAtStripe(payment, checkout, returnUrl) {
    await load(SCRIPTS.stripe);
    const stripe = window.Stripe(checkout.publishableKey);
    const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "night" : "stripe";
    const elements = stripe.elements({ clientSecret: checkout.clientSecret, appearance: { theme } });
    elements.create("payment").mount("#card-fields");
    say("card-pay", `Pay ${money(payment.amount, payment.currency)}`);
    $("card").hidden = false;
    $("card").onsubmit = (event) => {
      event.preventDefault();
      $("notice").hidden = true;
      working("We ask your bank", async () => {
        const { error } = await stripe.confirmPayment({ elements, redirect: "if_required", confirmParams: { return_url: returnUrl } });
        if (error) notify(error.message); // the card can be changed and tried again
        else quiet();
        await verify(payment, {});
      });
    };
  }

  function load(src) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = src;
      script.onload = resolve;
      script.onerror = () => {
        script.remove();
        reject(new Refused(0, { detail: "The gateway's page did not load. Please check your connection and try again." }));
      };
      document.head.append(script);
    });
  }

  /** What Razorpay gives the browser of somebody who paid. */
  const proof = (get) => ({
    razorpayPaymentId: get("razorpay_payment_id"),
    razorpayOrderId: get("razorpay_order_id"),
    razorpaySignature: get("razorpay_signature"),
  });

  const verify = (payment, given) => call("POST", `/payments/${payment.id}/verify`, given);

  /** Somebody comes back from a gateway's own page: what is said in the address only counts once the shop has checked it. */
  async function comeBack() {
    const named = back.get("razorpay_order_id") || back.get("payment_intent");
    const payment = named && payments.find((one) => one.gatewayOrderId === named);
    if (!payment) return;
    const given = payment.provider === "razorpay" ? proof((name) => back.get(name) || "") : {};
    if (payment.provider === "razorpay" && !given.razorpaySignature) return;
    await working("We check your payment", () => verify(payment, given));
  }

  /** Something that takes a moment, and may change what there is to see. */
  async function working(doing, work) {
    busy = doing;
    render();
    try {
      await work();
    } catch (error) {
      stumble(error);
    } finally {
      busy = "";
    }
    offers = null;
    await refresh().catch(stumble);
  }

  function stumble(error) {
    if (error instanceof Over) finish(error.message);
    else if (error instanceof Refused) notify(error.status === 502 || error.status === 503 ? "The shop does not answer now. Nothing is lost: this page shows what becomes of it." : error.message);
    else throw error;
  }

  // words

  const SAME_DAY = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
  const OTHER_DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "numeric", minute: "2-digit" });

  function clock(at) {
    const then = new Date(at);
    return (then.toDateString() === new Date().toDateString() ? SAME_DAY : OTHER_DAY).format(then);
  }

  function money(amount, currency) {
    const digits = Number(Object.keys(EXPONENTS).find((n) => EXPONENTS[n].includes(currency)) ?? 2);
    const how = { style: "currency", currency, minimumFractionDigits: digits, maximumFractionDigits: digits };
    return new Intl.NumberFormat(undefined, how).format(amount / 10 ** digits);
  }

  function words(state) {
    const { payment, currency, statusReason } = order;
    const due = money(payment.due, currency);
    if (state === "paid") {
      const paid = money(payment.paid, currency);
      if (payment.paid === 0) return ["Nothing to pay", "This order costs nothing.", "check"];
      return ["Paid", payment.refunded ? `${paid} arrived, ${money(payment.refunded, currency)} went back.` : `${paid} arrived. Thank you.`, "check"];
    }
    if (state === "closed") {
      const why = statusReason === "expired" ? "It was not paid in time." : statusReason || "It cannot be paid any more.";
      const paid = money(payment.paid, currency);
      const returned = payment.refunded >= payment.paid ? `${paid} went back the way it came.` : `${paid} goes back the way it came.`;
      return ["This order was cancelled", payment.paid > 0 ? `${why} ${returned}` : why, "cross"];
    }
    if (state === "waiting")
      return [busy || "Your payment is under way", busy ? "" : "We wait for your bank. This page shows it when the money arrives; you need not pay again.", "clock"];
    if (state === "failed") {
      const { failure } = payments[0];
      const why = (failure && failure.message) || "Your bank said no.";
      return ["The payment did not work", `${/[.!?]$/.test(why) ? why : `${why}.`} You can try again: ${due}. If your bank pays all the same, it counts for this order.`, "bang"];
    }
    return [`To pay: ${due}`, payment.paid > 0 ? `${money(payment.paid, currency)} has arrived already.` : "Choose how you want to pay.", ""];
  }

  // what is shown

  function notify(text) {
    say("notice", text);
    $("notice").hidden = false;
  }

  function quiet() {
    $("notice").hidden = true;
    $("card").hidden = true;
    $("card-fields").replaceChildren();
  }

  function render() {
    if (!order) return;
    const state = standing();
    const [title, about, icon] = words(state);
    document.title = `${title} · Order ${order.number}`;
    say("title", `Order ${order.number}`);
    say("state", title);
    say("about", about);
    $("seal").hidden = !icon;
    if (icon) $("seal-icon").setAttribute("href", `#i-${icon}`);
    $("page").dataset.state = state;
    $("page").setAttribute("aria-busy", String(Boolean(busy)));

    if (state === "paid" || state === "closed") quiet();
    const open = (state === "due" || state === "failed") && $("card").hidden;
    $("until").hidden = !(open && order.expiresAt);
    if (order.expiresAt) say("until", `The shop keeps your order until ${clock(order.expiresAt)}.`);
    $("choices").replaceChildren(...(open && offers ? offers.map(choice) : []));
    if (open && offers && !offers.length) say("about", "No way to pay is open just now. This page tries again by itself.");

    $("card-submit").disabled = Boolean(busy);
    $("track").hidden = state !== "paid";
    $("track-link").href = `${base}/track/${secret || orderId}`;
    bill();
    if (shown && shown !== state) {
      say("announcer", `${title}. ${about}`);
      $("state").focus(); // the button that somebody pressed is gone
    }
    shown = state;
  }

  function choice({ provider, sandbox }) {
    const [, what] = GATEWAYS[provider] || [];
    const button = make("button", "choice");
    button.type = "button";
    button.dataset.provider = provider;
    const about = sandbox ? "Simulator: no money moves" : what;
    button.append(make("b", "", `Pay ${money(order.payment.due, order.currency)} with ${nameOf(provider)}`), make("small", "", about));
    button.onclick = () => pay(provider);
    const item = make("li");
    item.append(button);
    return item;
  }

  function row(tag, name, sum, className) {
    const made = make(tag, className);
    const [left, right] = tag === "div" ? ["dt", "dd"] : ["span", "span"];
    made.append(make(left, "", name), make(right, "sum", money(sum, order.currency)));
    return made;
  }

  function bill() {
    const { totals, payment } = order;
    $("items").replaceChildren(...order.items.map((one) => row("li", `${one.quantity} × ${one.name}`, one.total - one.tax)));
    const sums = [["Discount", -totals.discount], ["Delivery", totals.delivery], ["Tax", totals.tax], ["Rounding", totals.rounding]];
    const rows = sums.filter(([, sum]) => sum).map(([name, sum]) => row("div", name, sum));
    rows.push(row("div", "Total", totals.total, "last"));
    if (payment.paid && payment.due) rows.push(row("div", "Paid", payment.paid), row("div", "Still to pay", payment.due, "last"));
    $("totals").replaceChildren(...rows);
  }

  // begin

  async function begin() {
    try {
      if (isOrder) recall();
      if (secret && !(await follow())) return;
      await refresh();
      await comeBack();
      await live();
    } catch (error) {
      if (error instanceof Over) finish(error.message);
      else if (error instanceof Refused) finish(error.status === 404 ? "missing" : "away");
      else throw error;
    }
  }

  addEventListener("pageshow", (event) => {
    if (!event.persisted || !order) return; // only when the browser's own button brought somebody back
    busy = "";
    refresh().catch(stumble);
  });
  begin();
})();
