"use strict";
/* Leaflet in a page without a screen: `L`, and `page.map(options)`, which makes a map of 512 by 512 pixels. */

// Node's own require, so that a warm process reads jsdom once; the page, and Leaflet, are new for every program.
const { createRequire } = process.getBuiltinModule("module");
const { JSDOM } = createRequire(__filename)("jsdom");

const { window } = new JSDOM("<!doctype html><body></body>");
const { document } = window;
for (const [name, value] of Object.entries({ window, document, navigator: window.navigator })) {
  Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });
}
// nothing is drawn: what would wait for the next frame is left undone
window.requestAnimationFrame = () => 1;
window.cancelAnimationFrame = () => {};
// by this Leaflet tells that lines can be drawn
window.SVGSVGElement.prototype.createSVGRect = () => {};

globalThis.L = require("leaflet");
const still = { fadeAnimation: false, zoomAnimation: false, markerZoomAnimation: false, inertia: false };

globalThis.page = {
  map(options = {}) {
    const place = document.createElement("div");
    Object.defineProperty(place, "clientWidth", { value: 512 });
    Object.defineProperty(place, "clientHeight", { value: 512 });
    document.body.appendChild(place);
    return globalThis.L.map(place, { center: [0, 0], zoom: 2, ...still, ...options });
  },
};
