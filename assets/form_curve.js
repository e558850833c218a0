// A curve over the depth of a model, drawn by hand: points at equal distances, dragged or moved by the arrow keys.
// fuseCurve(field, points, layers, done) returns an element; `done(points)` is called when a point was let go.
function fuseCurve(field, points, layers, done) {
  'use strict';

  const W = 520, H = 150, LEFT = 50, RIGHT = 14, TOP = 12, BOTTOM = 24, MOST = 17;
  const NS = 'http://www.w3.org/2000/svg';
  let values = points.slice();

  const svg = (tag, attributes) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    return node;
  };
  const low = () => field.low ?? Math.min(0, ...values);
  const high = () => Math.max(low() + 1e-9, field.high ?? Math.max(1, ...values) * (Math.max(...values) > 1 ? 1.1 : 1));
  const x = (i) => LEFT + (W - LEFT - RIGHT) * (values.length > 1 ? i / (values.length - 1) : 0.5);
  const y = (value) => TOP + (H - TOP - BOTTOM) * (1 - (value - low()) / (high() - low()));
  const text = (value) => String(Number(value.toPrecision(3)));
  const at = (depth) => {
    const place = depth * (values.length - 1);
    const i = Math.min(Math.floor(place), values.length - 2);
    return values[i] + (values[i + 1] - values[i]) * (place - i);
  };

  const root = document.createElement('div');
  root.className = 'fm-curve';
  const picture = svg('svg', { viewBox: `0 0 ${W} ${H}`, role: 'group', 'aria-label': `${field.label} over the layers` });
  const buttons = document.createElement('div');
  buttons.className = 'fm-curve-buttons';
  const less = button('−', 'One point less', () => resample(values.length - 1));
  const more = button('+', 'One point more', () => resample(values.length + 1));
  const flat = button('Flat', 'Make all points equal', () => { values = values.map(() => mean()); draw(); done(values); });
  const said = document.createElement('span');
  said.className = 'fm-curve-said';
  buttons.append(less, more, flat, said);
  root.append(picture, buttons);

  function button(label, title, act) {
    const node = document.createElement('button');
    node.type = 'button';
    node.className = 'fm-small';
    node.textContent = label;
    node.title = title;
    node.setAttribute('aria-label', title);
    node.addEventListener('click', act);
    return node;
  }
  const mean = () => Number((values.reduce((sum, value) => sum + value, 0) / values.length).toPrecision(4));

  function resample(count) {
    if (count < 2 || count > MOST) return;
    values = Array.from({ length: count }, (_, i) => Number(at(i / (count - 1)).toPrecision(4)));
    draw();
    done(values);
  }

  function draw() {
    const bottom = y(low()), ticks = [low(), (low() + high()) / 2, high()];
    const parts = ticks.flatMap((value) => {
      const line = svg('line', { x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value), class: 'fm-line' });
      const label = svg('text', { x: LEFT - 13, y: y(value) + 4, class: 'fm-tick', 'text-anchor': 'end' });
      label.textContent = text(value);
      return [line, label];
    });
    for (const [place, label, anchor] of [[LEFT, 'first layer', 'start'], [W - RIGHT, 'last layer', 'end']]) {
      const node = svg('text', { x: place, y: H - 6, class: 'fm-tick', 'text-anchor': anchor });
      node.textContent = label;
      parts.push(node);
    }
    const path = values.map((value, i) => `${x(i)},${y(value)}`).join(' ');
    parts.push(svg('polygon', { points: `${x(0)},${bottom} ${path} ${x(values.length - 1)},${bottom}`, class: 'fm-area' }));
    for (let layer = 0; layers > 1 && layer < layers; layer++) {
      const depth = layer / (layers - 1);
      parts.push(svg('circle', { cx: LEFT + (W - LEFT - RIGHT) * depth, cy: y(at(depth)), r: layers > 60 ? 1 : 2, class: 'fm-layer' }));
    }
    parts.push(svg('polyline', { points: path, class: 'fm-path' }));
    parts.push(...values.map(handle));
    picture.replaceChildren(...parts);
    less.disabled = values.length <= 2;
    more.disabled = values.length >= MOST;
    said.textContent = values.map(text).join('  ');
  }

  function handle(value, i) {
    const node = svg('circle', { cx: x(i), cy: y(value), r: 7, class: 'fm-point', tabindex: '0', role: 'slider',
      'aria-label': `${field.label}, point ${i + 1} of ${values.length}`, 'aria-valuenow': text(value),
      'aria-valuemin': text(low()), 'aria-valuemax': text(high()) });
    node.dataset.point = i;
    node.addEventListener('pointerdown', (event) => drag(event, i));
    node.addEventListener('keydown', (event) => key(event, i));
    return node;
  }

  function set(i, value) {
    let next = field.low === null ? value : Math.max(field.low, value);
    if (field.high !== null) next = Math.min(field.high, next);
    values[i] = Number(next.toFixed(Math.max(0, 3 - Math.floor(Math.log10(high() - low())))));
    draw();
  }
  function focus(i) { picture.querySelector(`[data-point="${i}"]`)?.focus(); }

  function drag(event, i) {
    event.preventDefault();
    focus(i);
    const [from, to] = [low(), high()]; // the scale stands still while a point is moved
    const move = (moved) => {
      const box = picture.getBoundingClientRect();
      const part = 1 - ((moved.clientY - box.top) * H / box.height - TOP) / (H - TOP - BOTTOM);
      set(i, from + Math.min(1, Math.max(0, part)) * (to - from));
    };
    const up = () => {
      window.removeEventListener('pointermove', move);
      window.removeEventListener('pointerup', up);
      focus(i);
      done(values);
    };
    window.addEventListener('pointermove', move);
    window.addEventListener('pointerup', up);
  }

  let waiting = 0;
  function key(event, i) {
    const step = (high() - low()) / 20;
    const by = { ArrowUp: step, ArrowDown: -step, PageUp: 5 * step, PageDown: -5 * step }[event.key];
    const to = { ArrowLeft: i - 1, ArrowRight: i + 1 }[event.key];
    if (by === undefined && to === undefined) return;
    event.preventDefault();
    if (to !== undefined) { focus(Math.min(values.length - 1, Math.max(0, to))); return; }
    set(i, values[i] + by);
    focus(i);
    clearTimeout(waiting);
    waiting = setTimeout(() => done(values), 600);
  }

  draw();
  return root;
}
