// Colours and numbers of the heatmap: pure functions, shared by its parts.
const fuseScale = (() => {
  'use strict';

  const VIRIDIS = ['440154', '482878', '3e4989', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725'];
  const channels = (hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const OPPOSED = ['b35806', 'e08214', 'fdb863', 'fee0b6', 'f7f7f7', 'd1e5f0', '92c5de', '4393c3', '2166ac']; // signed: orange, white, blue
  const shades = (stops) => Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
    const rgb = a.map((v, k) => Math.round(v + (b[k] - v) * (at - low)));
    // Whichever of black and white stands out more has at least 4.5:1 on any colour.
    return { fill: `rgb(${rgb.join(',')})`, ink: luminance(rgb) > 0.179 ? '#000' : '#fff' };
  });
  const [SHADES, SIGNED] = [shades(VIRIDIS), shades(OPPOSED)];

  const exact = (v) => (v === null ? '–' : v !== 0 && Math.abs(v) < 0.001 ? v.toExponential(4) : String(+v.toPrecision(5)));
  const scientific = (v) => (v === null ? '–' : v === 0 ? '0' : v.toExponential(4));
  const short = (v, q) => {
    if (q === 'variation') return v === -Infinity ? '0' : v.toFixed(1).replace('-', '−');
    return v > 0.995 ? '1' : v < 0.005 ? '0' : v.toFixed(2).slice(1);
  };

  // Where v stands in the span [low, high], as a fill and an ink; -Infinity, nothing changed, is the lowest colour.
  function shade(v, [low, high], diverging) {
    const position = v === -Infinity ? 0 : high > low ? (v - low) / (high - low) : 0.5;
    return (diverging ? SIGNED : SHADES)[Math.round(255 * Math.min(1, Math.max(0, position)))];
  }

  function el(tag, className, text, attributes) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    return node;
  }

  const ink = (hex) => (luminance(channels(hex.slice(1))) > 0.179 ? '#000' : '#fff');
  const gradient = (diverging) => `linear-gradient(to right,${(diverging ? OPPOSED : VIRIDIS).map((hex) => `#${hex}`).join(',')})`;
  return { el, exact, gradient, ink, scientific, shade, short };
})();
