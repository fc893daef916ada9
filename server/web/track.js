// The tracking page: finds out what its address means, follows that order, draws what it hears.
"use strict";
(() => {
  const STALE_MS = 45_000; // agents are asked for a position every 5 s; nine missed ones are no hiccup
  const ANSWER_MS = 6_000; // the server answers a subscribe within 4 s, yes or no
  const RETRY_MS = 500;
  const RETRY_MAX_MS = 8_000;
  const TRAIL_MAX = 400;

  const WORDS = {
    pending: ["Order placed", "Waiting for the shop to confirm it."],
    confirmed: ["Confirmed", "The shop has accepted your order."],
    preparing: ["Being prepared", "Your order is being prepared."],
    ready: ["Ready", "Packed and waiting for the courier."],
    in_progress: ["In progress", "Work on your order has begun."],
    out_for_delivery: ["On the way", "Your order is on its way to you."],
    delivery_failed: ["Delivery attempt failed", "It could not be handed over. The shop will try again or call."],
    delivered: ["Delivered", "Your order has been handed over."],
    return_requested: ["Return requested", "The shop is looking into the return."],
    returned: ["Returned", "The shop has your order back."],
    cancelled: ["Cancelled", "This order will not be delivered."],
  };
  const OTHER_WORDS = {
    pickup: { ready: ["Ready for pickup", "Come and collect it when it suits you."], delivered: ["Picked up", "You have your order."] },
    dine_in: { ready: ["Ready", "It comes to your table now."], delivered: ["Served", "Your order has been served."] },
    service: { delivered: ["Done", "The work on your order is done."] },
  };
  const STEPS = {
    delivery: ["pending", "confirmed", "preparing", "ready", "out_for_delivery", "delivered"],
    pickup: ["pending", "confirmed", "preparing", "ready", "delivered"],
    dine_in: ["pending", "confirmed", "preparing", "ready", "delivered"],
    service: ["pending", "confirmed", "in_progress", "delivered"],
  };
  const OVER = ["delivered", "cancelled", "returned", "return_requested"]; // no positions any more
  const ICONS = { cancelled: "cross", delivery_failed: "bang", returned: "back", return_requested: "back" };
  const LINK_WORDS = { connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", offline: "Offline", ended: "Ended" };
  const ENDS = {
    ended: ["This link has ended", "Links to an order work for a while only. Please ask the shop for a new one."],
    unknown: ["We do not know this link", "Please check that the address is complete, or ask the shop for a new link."],
    closed: ["Please open this page again", "Your access from here is over. Open the tracking page again from your order."],
    missing: ["There is nothing to see here", "We found no such order for you. Open the tracking page again from your order."],
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
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  // where we are

  const [, base, key] = /^(.*)\/track\/([^/]*)$/.exec(location.pathname) || [null, "", ""];
  const isOrder = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(key);

  // the server's clock: a phone's own may be wrong, and ages would lie

  let ahead = 0;
  const now = () => Date.now() - ahead;
  const learnClock = (response, began) => {
    const told = Date.parse(response.headers.get("Date"));
    const error = (began + Date.now()) / 2 - (told + 500);
    if (told) ahead = Math.abs(error) > 2000 ? error : 0;
  };

  // access

  class Over extends Error {}

  let token = "";
  let orderId = isOrder ? key.toLowerCase() : "";
  let expiresAt = 0;
  let over = false;

  const pause = (ms) =>
    new Promise((resolve) => {
      setTimeout(resolve, ms);
      addEventListener("online", resolve, { once: true });
    });
  const backoff = (failures) => Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** failures) * (0.5 + Math.random());

  /** Exchange the link's secret for a token. Throws Over when it opens nothing (any more). */
  async function follow() {
    for (let failures = 0; ; failures++) {
      let wait = backoff(failures);
      try {
        const began = Date.now();
        const response = await fetch(`${base}/api/v1/links/follow`, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ secret: decodeURIComponent(key) }),
          signal: AbortSignal.timeout(10_000),
        });
        learnClock(response, began);
        if (response.ok) return await response.json();
        if (response.status < 500 && response.status !== 408 && response.status !== 429)
          throw new Over(response.status === 410 ? "ended" : "unknown");
        wait = Math.max(wait, 1000 * response.headers.get("Retry-After") || 0);
      } catch (error) {
        if (error instanceof URIError) throw new Over("unknown");
        if (error instanceof Over) throw error;
      }
      if (!over) showLink("reconnecting");
      await pause(wait);
    }
  }

  /** A token that lives longer than the one we have; false when there is none to be had yet. */
  async function renew() {
    if (isOrder) throw new Over("closed");
    const grant = await follow();
    const until = Date.parse(grant.expiresAt);
    const longer = until > expiresAt + 1000;
    ({ token, orderId } = grant);
    expiresAt = until;
    return longer;
  }

  /** The customer's token comes in the fragment, which no server sees, and does not stay where others may read it. */
  function takeToken() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    const slot = `waybill:${orderId}`; // this tab's memory: a reload must not lose the page
    if (location.hash) history.replaceState(null, "", location.pathname + location.search);
    try {
      if (given) sessionStorage.setItem(slot, given);
      token = given || sessionStorage.getItem(slot) || "";
    } catch {
      token = given || "";
    }
    return Boolean(given);
  }

  function forgetToken() {
    try {
      sessionStorage.removeItem(`waybill:${orderId}`);
    } catch {
      // was not kept either
    }
  }

  function finish(why) {
    if (over) return;
    over = true;
    if (isOrder) forgetToken();
    if (socket) socket.disconnect();
    showLink("ended");
    forgetPosition();
    const [title, text] = ENDS[why] || ENDS.unknown;
    if (why === "closed" && order) {
      // what a customer has already seen stays; only the news are over
      notify(`${title}. ${text}`);
      render();
      return;
    }
    order = null;
    story = [];
    for (const id of ["page", "notice"]) $(id).hidden = true;
    document.title = title;
    say("title", "Order tracking");
    say("problem-title", title);
    say("problem-text", text);
    $("problem").hidden = false;
  }

  // the connection

  let socket = null;
  let asked = 0;
  let subscribed = false;
  let failures = 0;
  let endCode = "";
  let hiddenSince = 0;

  function connect() {
    socket = io({
      path: `${base}/socket.io/`,
      auth: (give) => give({ token }),
      transports: ["websocket", "polling"],
      tryAllTransports: true,
      reconnectionDelay: RETRY_MS,
      reconnectionDelayMax: RETRY_MAX_MS,
      timeout: 10_000,
    });
    socket.on("connect", subscribe);
    socket.on("disconnect", (reason) => {
      lost();
      if (reason === "io server disconnect") enterAgain(endCode);
      endCode = "";
    });
    socket.on("connect_error", (error) => {
      lost();
      if (!socket.active) enterAgain(error.data ? error.data.code : "");
    });
    socket.onAny((name, data) => {
      if (!data) return;
      if (name === "disconnected") endCode = data.code;
      else if (name === "tokenExpiring") expiring(data.expiresAt);
      else if (data.orderId !== orderId) return;
      else if (name === "orderLocationUpdate") located(data);
      else if (name === "subscriptionClosed") closed(data.code);
      else if (Number.isInteger(data.seq)) heard({ type: name, seq: data.seq, at: data.at, data });
    });
  }

  function lost() {
    subscribed = false;
    asked++;
    if (!over) showLink(navigator.onLine ? "reconnecting" : "offline");
  }

  /** The server has sent us away, or did not let us in: with a new token it may. */
  async function enterAgain(code) {
    if (over) return;
    try {
      if (code === "revoked" || code === "forbidden") throw new Over(isOrder ? "closed" : "ended");
      await pause(failures ? backoff(failures) : 0);
      failures++;
      if (code === "expired" || code === "unauthenticated") await renew();
      if (!over && !socket.connected) socket.connect();
    } catch (error) {
      if (!(error instanceof Over)) throw error;
      finish(error.message);
    }
  }

  async function expiring(at) {
    expiresAt = expiresAt || Date.parse(at);
    if (isOrder) {
      notify(`This page can show news until ${clock(at)}. To go on, open it again from your order.`);
      return;
    }
    try {
      if ((await renew()) && socket.connected) socket.emit("refreshToken", { token });
    } catch (error) {
      if (!(error instanceof Over)) throw error;
      finish(error.message);
    }
  }

  function closed(code) {
    subscribed = false;
    if (code === "revoked") finish(isOrder ? "closed" : "ended");
  }

  function subscribe() {
    const turn = ++asked;
    socket.timeout(ANSWER_MS).emit("subscribeToOrder", { orderId, afterSeq: seq }, async (error, answer) => {
      if (turn !== asked || !socket.connected) return;
      if (error) {
        socket.io.engine.close(); // nobody is there: the client comes back by itself
        return;
      }
      if (answer.ok) {
        take(answer);
        return;
      }
      const code = answer.error.code;
      if (code === "invalid" && seq > 0) {
        seq = 0; // the server knows less than we do (a restored backup): its word counts
        story = [];
      } else if (code === "not_found" || code === "forbidden" || code === "invalid") {
        finish("missing");
        return;
      }
      await pause(Math.max(answer.error.retryAfterMs || 0, backoff(failures++)));
      if (turn === asked && socket.connected) subscribe();
    });
  }

  /** Whether somebody is still there after the phone slept; positions and events are fetched by the way. */
  function wake() {
    if (over || !socket) return;
    if (socket.connected) subscribe();
    else if (socket.active) socket.disconnect().connect(); // now, not when the pause is over
  }

  // what we know

  let order = null;
  let seq = 0;
  let story = [];
  let last = null; // newest position

  function take(answer) {
    const first = order === null;
    const before = order && order.status;
    failures = 0;
    subscribed = true;
    for (const event of answer.events) if (event.seq === seq + 1) learn(event);
    order = answer.order;
    seq = answer.seq;
    if (OVER.includes(order.status) || !order.agent) forgetPosition();
    if (answer.location) located(answer.location);
    showLink("live");
    render();
    if (!first && order.status !== before) announce();
  }

  function heard(event) {
    if (!subscribed || event.seq <= seq) return;
    if (event.seq > seq + 1) {
      subscribe(); // must not happen; the server fills the hole
      return;
    }
    learn(event);
    render();
    if (event.type === "orderStatusUpdate") announce();
  }

  /** The next event, in its turn. */
  function learn(event) {
    seq = event.seq;
    const { data } = event;
    if (event.type === "orderStatusUpdate") {
      if (order) Object.assign(order, { status: data.status, statusReason: data.note });
      story.push({ at: event.at, status: data.status, note: data.note });
      if (OVER.includes(data.status)) forgetPosition();
    } else if (event.type === "deliveryAgentAssigned") {
      if (order) order.agent = data.agent;
      if (data.agent) story.push({ at: event.at, agent: data.agent });
      forgetPosition();
    } else if (order && event.type.startsWith("payment")) {
      order.expiresAt = data.expiresAt;
    }
  }

  function located(position) {
    if (!subscribed || !order || OVER.includes(order.status) || (last && position.ts <= last.ts)) return;
    const first = last === null;
    last = position;
    chart.move(position);
    if (first) render();
    showAge();
  }

  function forgetPosition() {
    last = null;
    chart.clear();
  }

  // words

  const SAME_DAY = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
  const OTHER_DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "numeric", minute: "2-digit" });

  function clock(at) {
    const then = new Date(at);
    return (then.toDateString() === new Date(now()).toDateString() ? SAME_DAY : OTHER_DAY).format(then);
  }

  function words(status) {
    const other = OTHER_WORDS[order.fulfilment];
    const plain = status.replaceAll("_", " ");
    return (other && other[status]) || WORDS[status] || [plain[0].toUpperCase() + plain.slice(1), ""];
  }

  function metres(distance) {
    if (distance < 1000) return `${Math.max(10, Math.round(distance / 10) * 10)} m`;
    return `${(distance / 1000).toLocaleString(undefined, { maximumFractionDigits: distance < 10_000 ? 1 : 0 })} km`;
  }

  function age(ms) {
    const s = Math.max(0, Math.floor(ms / 1000));
    if (s < 120) return `${s} s`;
    return s < 7200 ? `${Math.floor(s / 60)} min` : `${Math.floor(s / 3600)} h`;
  }

  // what is shown

  function showLink(state) {
    $("link").dataset.state = state;
    say("link-text", LINK_WORDS[state]);
  }

  function notify(text) {
    say("notice", text);
    $("notice").hidden = false;
  }

  function announce() {
    say("announcer", `Order ${order.number}: ${words(order.status)[0]}. ${words(order.status)[1]}`);
  }

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    use.setAttribute("href", `#i-${name}`);
    svg.setAttribute("class", "icon");
    svg.setAttribute("aria-hidden", "true");
    svg.append(use);
    return svg;
  }

  function entry({ at, status, agent, note }, current) {
    const item = make("li", agent ? "small" : `${current ? "current" : "done"} ${ICONS[status] || ""}`);
    if (current) item.setAttribute("aria-current", "step");
    const dot = make("span", "dot");
    if (!agent) dot.append(icon(ICONS[status] || "check"));
    const label = make("span", "label", agent ? `${agent.name || "A courier"} takes care of it` : words(status)[0]);
    const time = make("time", "", clock(at));
    time.dateTime = at;
    item.append(dot, label, time);
    if (note) item.append(make("span", "note", note));
    return item;
  }

  function coming(status) {
    const item = make("li", "next");
    item.append(make("span", "dot"), make("span", "unseen", "Still to come: "), make("span", "label", words(status)[0]));
    return item;
  }

  function render() {
    if (!order) return;
    const { status, agent } = order;
    const [title, about] = words(status);
    const done = OVER.includes(status);
    document.title = `${title} · Order ${order.number}`;
    say("title", `Order ${order.number}`);
    say("status", title);
    const unpaid = status === "pending" && order.expiresAt && `Waiting for the payment until ${clock(order.expiresAt)}.`;
    say("about", order.statusReason || unpaid || about);
    $("page").dataset.status = status;
    $("page").setAttribute("aria-busy", "false");

    const fetched = order.fulfilment === "pickup" || order.fulfilment === "dine_in";
    const name = (agent && agent.name) || "Courier";
    $("courier").hidden = !agent && (fetched || done);
    say("courier-initial", agent ? name[0].toUpperCase() : "…");
    say("courier-name", name);
    showCourier();

    const steps = STEPS[order.fulfilment] || [];
    const at = steps.indexOf(status === "delivery_failed" ? "ready" : status);
    const newest = story.findLastIndex((one) => one.status);
    $("timeline").replaceChildren(
      ...story.map((one, index) => entry(one, index === newest)),
      ...(at < 0 ? [] : steps.slice(at + 1)).map(coming),
    );

    $("map-panel").hidden = fetched && !last;
    $("map").toggleAttribute("hidden", !last);
    $("rest").hidden = Boolean(last);
    $("seen").hidden = !last;
    if (!last) {
      const newestStatus = story[newest];
      const gone = done || over;
      $("rest").dataset.kind = status;
      $("rest-icon").setAttribute("href", `#i-${status === "delivered" ? "check" : ICONS[status] || "route"}`);
      say(
        "rest-text",
        gone && newestStatus && done ? `${title}, ${clock(newestStatus.at)}`
        : gone ? "No position is shown any more"
        : agent ? "Waiting for the courier's position"
        : "The map comes when a courier has your order",
      );
    }
    chart.aim(order.deliveryAddress);
    renderMore();
    showAge();
  }

  function renderMore() {
    const address = order.deliveryAddress;
    $("more").hidden = false;
    $("items").replaceChildren(...order.items.map((one) => make("li", "", `${one.quantity} × ${one.name}`)));
    say("address", address ? `To ${[address.line1, address.line2, address.landmark, address.city].filter(Boolean).join(", ")}` : "");
    say("reference", order.reference ? `Reference ${order.reference}` : "");
  }

  function showCourier() {
    const { status, agent } = order;
    const away = last && status === "out_for_delivery" ? chart.away() : null;
    const doing = !agent ? "Not assigned yet"
      : status === "delivered" ? "Brought your order"
      : OVER.includes(status) ? "Was on your order"
      : status === "out_for_delivery" ? "Is bringing your order" : "Will bring your order";
    say("courier-about", away === null ? doing : `${metres(away)} away in a straight line`);
    say("vehicle", (agent && agent.vehicle) || "");
  }

  let wasStale = false;
  function showAge() {
    if (!last || over) return;
    const ms = now() - last.ts;
    const stale = ms > STALE_MS;
    say("seen-text", ms < 3000 ? "Last seen just now" : `Last seen ${age(ms)} ago`);
    $("map-panel").dataset.stale = stale;
    if (stale && !wasStale) say("announcer", `The courier's position is ${age(ms)} old.`);
    wasStale = stale;
    showCourier();
    const away = chart.away();
    $("map").setAttribute("aria-label", `Map: the courier${away === null ? "" : `, ${metres(away)} from the destination`}, ${stale ? "an old position" : "moving live"}`);
  }

  // the map: no tiles, only what we know, north up

  const chart = (() => {
    const PAD = 64;
    const SPAN_MIN_M = 400;
    let origin = null; // everything is metres east and south of here
    let box = { w: 0, h: 0 };
    let trail = [];
    let goal = null;
    let shown = null; // where the marker is drawn, on its way from `from` to the newest point
    let from = null;
    let began = 0;
    let lasts = 0;
    let turn = null;
    let accuracy = 0;
    let camera = null;
    let target = null;
    let frame = 0;
    let painted = 0;

    const place = ({ lat, lng }) => {
      origin = origin || { lat, lng };
      const east = ((lng - origin.lng + 540) % 360) - 180;
      return { x: east * 111_320 * Math.cos((origin.lat * Math.PI) / 180), y: (origin.lat - lat) * 110_574 };
    };
    const apart = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);

    function move(position) {
      const point = place(position);
      const before = trail.at(-1);
      const arrived = performance.now();
      trail.push(point);
      if (trail.length > TRAIL_MAX) trail = trail.filter((_, index) => (trail.length - index) % 2 === 1); // the same way, coarser
      if (position.heading !== undefined) turn = position.heading;
      else if (before && apart(before, point) > 4) turn = (Math.atan2(point.x - before.x, before.y - point.y) * 180) / Math.PI;
      accuracy = position.accuracy || 0;
      const jump = !shown || calm.matches || document.hidden || apart(shown, point) > 2000;
      from = jump ? point : shown;
      lasts = jump ? 0 : Math.min(1500, Math.max(300, arrived - began));
      began = arrived;
      if (jump) shown = point;
      $("marker").dataset.ts = position.ts;
      fit();
      draw();
    }

    function clear() {
      trail = [];
      shown = from = target = camera = turn = null;
      delete $("marker").dataset.ts;
    }

    function aim(address) {
      const known = address && address.lat !== undefined && address.lng !== undefined;
      goal = known ? place(address) : null;
      if (shown) {
        fit();
        draw();
      }
    }

    /** Where the camera should look: everything in sight; it moves only when it has to. */
    function fit() {
      if (!shown || !box.w) return;
      const points = goal ? [...trail, goal] : trail;
      const xs = points.map((p) => p.x);
      const ys = points.map((p) => p.y);
      const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const room = { w: Math.max(80, box.w - 2 * PAD), h: Math.max(80, box.h - 2 * PAD) };
      const scale = Math.min(room.w / Math.max(right - left, SPAN_MIN_M), room.h / Math.max(bottom - top, SPAN_MIN_M));
      const ideal = { x: (left + right) / 2, y: (top + bottom) / 2, s: scale };
      const inside = target && points.every((p) => Math.abs(p.x - target.x) * target.s < box.w / 2 - PAD / 2 && Math.abs(p.y - target.y) * target.s < box.h / 2 - PAD / 2);
      if (!inside || ideal.s > 1.4 * target.s) target = ideal;
      camera = camera || target;
    }

    function draw() {
      if (!frame) frame = requestAnimationFrame(paint);
    }

    function paint(time) {
      frame = 0;
      if (!shown || !camera) return;
      const tip = trail.at(-1);
      const share = lasts ? Math.min(1, Math.max(0, (time - began) / lasts)) : 1;
      shown = { x: from.x + (tip.x - from.x) * share, y: from.y + (tip.y - from.y) * share };
      const step = calm.matches || !painted ? 1 : 1 - Math.exp(-(time - painted) / 180);
      camera = { x: camera.x + (target.x - camera.x) * step, y: camera.y + (target.y - camera.y) * step, s: camera.s * (target.s / camera.s) ** step };
      painted = time;
      render();
      const still = share === 1 && Math.abs(camera.s / target.s - 1) < 0.002 && apart(camera, target) * camera.s < 0.3;
      if (still) painted = 0;
      else draw();
    }

    function render() {
      const { w, h } = box;
      const at = (p) => [w / 2 + (p.x - camera.x) * camera.s, h / 2 + (p.y - camera.y) * camera.s];
      const put = (id, p, more = "") => $(id).setAttribute("transform", `translate(${at(p).map((n) => n.toFixed(1))})${more}`);
      const set = (id, values) => {
        for (const name in values) $(id).setAttribute(name, values[name]);
      };

      const nice = (wanted) => {
        const power = 10 ** Math.floor(Math.log10(wanted));
        return power * (wanted / power >= 5 ? 5 : wanted / power >= 2 ? 2 : 1);
      };
      const gap = nice(120 / camera.s) * camera.s;
      const [x0, y0] = at({ x: 0, y: 0 });
      let grid = "";
      for (let x = ((x0 % gap) + gap) % gap; x < w; x += gap) grid += `M${x.toFixed(1)} 0V${h}`;
      for (let y = ((y0 % gap) + gap) % gap; y < h; y += gap) grid += `M0 ${y.toFixed(1)}H${w}`;
      $("grid").setAttribute("d", grid);

      const way = [...trail.slice(0, -1), shown].map((p) => at(p).map((n) => n.toFixed(1)).join()).join(" ");
      for (const id of ["trail", "trail-edge"]) $(id).setAttribute("points", way);

      put("marker", shown);
      $("heading").toggleAttribute("hidden", turn === null);
      if (turn !== null) set("heading", { transform: `rotate(${turn.toFixed(0)})` });
      const radius = accuracy * camera.s;
      set("accuracy", { r: radius > 18 && radius < 120 ? radius.toFixed(1) : 0 });

      for (const id of ["home", "beeline"]) $(id).toggleAttribute("hidden", !goal);
      if (goal) {
        put("home", goal);
        const [[x1, y1], [x2, y2]] = [at(shown), at(goal)];
        set("beeline", { x1, y1, x2, y2 });
      }

      const length = nice(110 / camera.s);
      set("scale", { transform: `translate(16 ${h - 18})` });
      set("scale-line", { d: `M0-5V0H${(length * camera.s).toFixed(1)}V-5` });
      say("scale-text", length < 1000 ? `${length} m` : `${length / 1000} km`);
      set("north", { transform: `translate(${w - 22} ${h - 24})` });
    }

    new ResizeObserver(([{ contentRect }]) => {
      box = { w: contentRect.width, h: contentRect.height };
      if (!shown || !box.w) return;
      target = null;
      fit();
      camera = target;
      draw();
    }).observe($("map-panel"));

    return { move, clear, aim, away: () => (goal && trail.length ? apart(trail.at(-1), goal) : null) };
  })();

  // begin

  async function begin() {
    try {
      if (isOrder) {
        takeToken();
        if (!token) throw new Over("closed");
        const began = Date.now();
        fetch(location.pathname, { method: "HEAD" }).then((response) => learnClock(response, began), () => {});
      } else {
        await renew();
      }
      connect();
    } catch (error) {
      if (!(error instanceof Over)) throw error;
      finish(error.message);
    }
  }

  addEventListener("hashchange", () => {
    if (isOrder && takeToken()) location.reload(); // opened again with a new token
  });
  addEventListener("online", wake);
  addEventListener("offline", () => !over && showLink("offline"));
  addEventListener("pageshow", (event) => event.persisted && wake());
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) hiddenSince = Date.now();
    else if (Date.now() - hiddenSince > 15_000) wake();
  });
  setInterval(showAge, 1000);
  begin();
})();
