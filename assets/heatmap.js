// Draws the heatmap of components/heatmap.py into `root`. `send(edit)` carries an edit to Python; without it the figure is
// read-only. Returns {update(value)}. Data only ever enters the page as textContent and attributes, never as markup, and no
// listener outlives `root`: the one on window waits for a single scroll while a tooltip is open.
function fuseHeatmap(root, send) {
  'use strict';

  const { el, exact, gradient, scientific, shade } = fuseScale;
  const QUANTITIES = fuseQuantities;

  // ---------------------------------------------------------------- words
  const titled = (closer) => Object.fromEntries(Object.entries(QUANTITIES).filter(([, its]) => Boolean(its.closer) === closer)
    .map(([name, its]) => [name, its.title]));
  const SCALES = { shared: 'Shared scale', own: 'Own scale' };
  const STORE = 'fusechat-heatmap';

  // ---------------------------------------------------------------- state
  let data = null;
  let structure = '';
  let grids = []; // one per card and block: {k, t, b, node, at: [R + 1][C + 1] elements, cells: [elements]}; t = its target or -1
  let pending = null; // an edit that was sent and not yet answered
  let width = 0;
  const places = new WeakMap(); // element → {grid, r, c, i}; r or c = -1 in the headers, i = -1 there
  const choice = remembered();

  function remembered() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(STORE)) || {};
      return { quantity: kept.quantity in QUANTITIES && kept.quantity, scale: kept.scale in SCALES && kept.scale };
    } catch { return {}; }
  }
  function choose(name, value) {
    choice[name] = value;
    // Kept for the visit, so that a reload or a tab built anew shows the same.
    try { sessionStorage.setItem(STORE, JSON.stringify(choice)); } catch { /* a file opened from disk may have no storage */ }
    draw();
  }
  const known = (name) => name in QUANTITIES && (!QUANTITIES[name].closer || Boolean(data.closer?.cards[name]));
  const quantity = () => (known(choice.quantity) ? choice.quantity : data.quantity);
  const its = () => QUANTITIES[quantity()];
  const scale = () => choice.scale || data.scale;
  // The cards of the quantity that is shown, and the numbers on them; a target's own quantities have a card per target.
  const shownCards = () => (its().closer ? data.closer.cards[quantity()] : data.targets.map((target, t) => (
    { name: target.name, letters: target.letter, colors: [target.color], target: t, mean: target.mean[quantity()] })));
  const numbers = (k, b) => (its().closer ? data.blocks[b].closer[quantity()][k] : data.blocks[b].values[k][quantity()]);
  const weightless = () => quantity() === 'weight' && data.weightless;

  // ---------------------------------------------------------------- numbers and scales
  function shown(k, b, i) {
    const v = numbers(k, b)[i];
    return v === null || !its().log ? v : Math.log10(v); // 0, nothing changed, is -Infinity here
  }
  function range(k) {
    const { full, widens, diverging, from } = its();
    let [low, high] = [Infinity, -Infinity];
    for (const other of scale() === 'shared' ? shownCards().keys() : [k]) {
      data.blocks.forEach((block, b) => block.name.forEach((_, i) => {
        const v = shown(other, b, i);
        if (v === null || v === -Infinity) return;
        low = Math.min(low, v);
        high = Math.max(high, v);
      }));
    }
    if (scale() === 'shared' && full) return widens && low <= high ? [Math.min(full[0], low), Math.max(full[1], high)] : full;
    if (low > high) return [0, 1];
    if (diverging) return [-Math.max(-low, high), Math.max(-low, high)];
    return from === undefined ? [low, high] : [from, Math.max(high, 0.001)];
  }
  function unit() {
    const { preview } = data;
    const sure = preview && quantity() === 'ratio' ? ` · estimated, ± ${exact(2 * preview.error)} at most` : preview ? ' · estimated' : '';
    return its().unit(data) + sure;
  }

  // ---------------------------------------------------------------- the fixed parts
  const toolbar = el('div', 'hm-toolbar');
  const hint = el('p', 'hm-hint');
  const notice = el('p', 'hm-empty');
  const cards = el('div', 'hm-cards');
  const key = el('div', 'hm-key');
  const NOTHING = 'Pick a pivot and at least one target to see how far every matrix moved.';
  const empty = el('p', 'hm-empty', NOTHING);
  const live = el('div', 'hm-sr', undefined, { 'aria-live': 'polite', role: 'status' });
  const legend = el('div', 'hm-legend');
  const group = `hm-quantity-${Math.random().toString(36).slice(2)}`;
  const radios = [segments('Quantity', 'quantity', titled(false), group), segments('Closer look', 'quantity', titled(true), group),
    segments('Colour scale', 'scale', SCALES)];
  toolbar.append(...radios.map((group) => group.node), legend);
  const view = { data: () => data, grids: () => grids, places, where, chosen, editable };
  const tip = fuseTip(view);
  const editor = send && fuseEditor(view, request);
  root.replaceChildren(empty, toolbar, hint, notice, cards, key, tip.node, live, ...(editor ? [editor.node] : []));
  new ResizeObserver(() => { if (data && root.clientWidth && root.clientWidth !== width) fit(); }).observe(root);

  function editable(grid) { return Boolean(send) && !data.preview && grid.t >= 0; }
  function sayHow() {
    const exactly = 'Hover or move with the arrow keys for exact numbers.';
    const percent = data.preview && +(100 * data.preview.sampled).toPrecision(2);
    if (data.preview) return `A preview: estimated from ${percent} % of the numbers. ± is twice the standard error; about 95 % of the exact ratios lie within.`;
    if (!send) return exactly;
    if (grids.some(editable)) return `${exactly} Click or Enter changes the weight of a cell, a row or a column; L locks, R resets.`;
    return `${exactly} This belongs to several targets at once; weights are edited in the other views.`;
  }

  function segments(label, name, options, group = `hm-${name}-${Math.random().toString(36).slice(2)}`) {
    const node = el('fieldset', 'hm-segments');
    node.append(el('legend', 'hm-sr', label));
    const inputs = Object.entries(options).map(([value, text]) => {
      const input = el('input', 'hm-sr', undefined, { type: 'radio', name: group, value });
      input.addEventListener('change', () => choose(name, value));
      const box = el('label');
      box.append(input, el('span', '', text));
      node.append(box);
      return input;
    });
    return { node, check: (value) => inputs.forEach((input) => { input.checked = input.value === value; }),
      offer: (test) => { // only what is known; without any, the box is gone
        inputs.forEach((input) => { input.parentNode.hidden = !test(input.value); });
        node.hidden = inputs.every((input) => input.parentNode.hidden);
      } };
  }

  // ---------------------------------------------------------------- building the grids
  function build() {
    grids = [];
    cards.replaceChildren(...shownCards().map((its, k) => {
      const said = its.target === null ? `${its.letters.split('').join(', ')}: ${its.name}` : `Target ${its.letters}: ${its.name}`;
      const card = el('section', 'hm-card', undefined, { 'aria-label': said });
      const head = el('div', 'hm-head');
      its.colors.forEach((color, n) => {
        const dot = el('span', 'hm-dot', undefined, { 'aria-hidden': 'true' });
        dot.style.backgroundColor = color;
        head.append(dot, el('b', '', its.letters[n]));
      });
      head.append(el('span', 'hm-name', its.name, { title: its.name }), el('small', 'hm-mean'));
      card.append(head, el('div', 'hm-legend'), ...data.blocks.map((block, b) => buildBlock(k, its.target ?? -1, b, block)));
      return card;
    }));
    for (const grid of grids) grid.node.querySelector('[role=gridcell][tabindex]')?.setAttribute('tabindex', '0');
  }

  function buildBlock(k, t, b, block) {
    const caption = el('div', 'hm-caption');
    caption.append(el('span', '', block.title));
    if (block.layers) caption.append(el('span', 'hm-count', `${block.rows.length} ${block.rows.length === 1 ? 'layer' : 'layers'}`));
    const node = el('div', 'hm-grid', undefined, { role: 'grid' });
    if (!send) node.setAttribute('aria-readonly', 'true');
    const at = [-1, ...block.rows].map(() => [-1, ...block.columns].map(() => null));
    const grid = { k, t, b, node, at, cells: [], tracks: tracks(block) };
    grids.push(grid);
    node.append(...headerRows(grid, block), ...block.rows.map((label, r) => buildRow(grid, block, label, r)));
    const box = el('div', 'hm-scroll');
    box.append(node);
    const whole = el('div', 'hm-block');
    whole.append(caption, box);
    return whole;
  }

  // Grid lines: 1 is the row header; a thin empty track stands between two groups.
  function tracks(block) {
    let line = 2;
    return block.columns.map((column, c) => {
      if (c && column.group !== block.columns[c - 1].group) line += 1;
      return line++;
    });
  }

  function place(grid, node, r, c, i) {
    places.set(node, { grid, r, c, i });
    grid.at[r + 1][c + 1] = node;
    node.tabIndex = -1;
    return node;
  }

  function headerRows(grid, block) {
    const rows = [];
    if (block.layers) {
      const row = el('div', 'hm-row', undefined, { role: 'row' });
      row.append(el('span', '', '', { role: 'gridcell' }));
      block.columns.forEach((column, c) => {
        if (c && column.group === block.columns[c - 1].group) return;
        const span = block.columns.filter((other) => other.group === column.group).length;
        const head = el('div', 'hm-group', column.group, { role: 'columnheader', 'aria-colspan': span, title: column.group });
        head.style.gridColumn = `${grid.tracks[c]} / span ${span}`;
        row.append(head);
      });
      rows.push(row);
    }
    const row = el('div', 'hm-row', undefined, { role: 'row' });
    // One row needs no corner: its own header already means all of it.
    const corner = block.layers ? place(grid, el('div', 'hm-corner', 'all', { role: 'columnheader' }), -1, -1, -1)
      : el('span', '', '', { role: 'gridcell' });
    row.append(corner, ...block.columns.map((column, c) => {
      const head = place(grid, el('div', 'hm-column', undefined, { role: 'columnheader' }), -1, c, -1);
      const text = el('span');
      for (const piece of pieces(column.label)) text.append(piece, el('wbr'));
      head.append(text);
      head.style.gridColumn = grid.tracks[c];
      return head;
    }));
    rows.push(row);
    return rows;
  }

  function buildRow(grid, block, label, r) {
    const row = el('div', 'hm-row', undefined, { role: 'row' });
    row.append(place(grid, el('div', 'hm-layer', label, { role: 'rowheader' }), r, -1, -1));
    const index = new Map();
    block.row.forEach((at, i) => { if (at === r) index.set(block.column[i], i); });
    block.columns.forEach((_, c) => {
      const i = index.get(c);
      const there = i !== undefined && (grid.t < 0 ? block.values.some((values) => values.present[i]) : block.values[grid.t].present[i]);
      const cell = el('div', there ? 'hm-cell' : 'hm-cell hm-missing', undefined, { role: 'gridcell' });
      if (there) grid.cells[i] = place(grid, cell, r, c, i);
      else cell.setAttribute('aria-label', `${where(grid, r, c)}: not in this layer`);
      cell.style.gridColumn = grid.tracks[c];
      row.append(cell);
    });
    return row;
  }

  function where({ b }, r, c) {
    const block = data.blocks[b];
    const column = c < 0 ? '' : block.columns[c].label;
    const row = block.layers && r >= 0 ? `layer ${block.rows[r]}` : '';
    if (r < 0 && c < 0) return `all of ${block.title}`;
    if (!block.layers) return c < 0 ? 'all outside the layers' : column;
    if (r < 0) return `every ${column}`;
    return c < 0 ? `all of ${row}` : `${row}, ${column}`;
  }

  // ---------------------------------------------------------------- painting: colours, numbers, labels; never the structure
  function paint() {
    radios[0].check(quantity());
    radios[1].check(quantity());
    radios[1].offer(known);
    radios[2].check(scale());
    const ranges = shownCards().map((card, k) => {
      const write = its().head || ((v) => `mean ${its().write(v)}`);
      cards.children[k].querySelector('.hm-mean').textContent = write(card.mean);
      drawLegend(cards.children[k].querySelector('.hm-legend'), scale() === 'own' ? range(k) : null);
      return range(k);
    });
    drawLegend(legend, scale() === 'shared' && !weightless() ? ranges[0] : null);
    for (const grid of grids) paintGrid(grid, ranges[grid.k]);
    notice.textContent = weightless() || '';
    notice.hidden = !weightless();
    cards.hidden = key.hidden = hint.hidden = Boolean(weightless());
    hint.textContent = sayHow();
    drawKey();
    fit();
  }

  function paintGrid(grid, span) {
    const { k, t, b, node } = grid;
    const block = data.blocks[b];
    const { letters, name } = shownCards()[k];
    node.setAttribute('aria-label', `${t < 0 ? '' : 'Target '}${letters}, ${name}, ${block.title}: ${its().word}`);
    grid.cells.forEach((cell, i) => {
      const v = shown(k, b, i);
      const fixed = t >= 0 && Boolean(block.values[t].fixed[i]);
      const { fill, ink } = v === null ? { fill: 'transparent', ink: '' } : shade(v, span, its().diverging);
      cell.style.setProperty('--hm-fill', fill);
      cell.style.color = ink;
      cell.dataset.number = v === null || block.excluded[i] ? '' : its().short(its().unlog ? numbers(k, b)[i] : v); // drawn by CSS: the label already says it exactly
      cell.className = `hm-cell${v === null ? ' hm-missing hm-undefined' : ''}${fixed ? ' hm-fixed' : ''}`
        + `${block.excluded[i] ? ' hm-excluded' : ''}`;
      cell.setAttribute('aria-label', describe(grid, i));
    });
    grid.at.forEach((row, r) => row.forEach((head, c) => {
      if (head && (r === 0 || c === 0)) head.setAttribute('aria-label', where(grid, r - 1, c - 1));
    }));
  }

  function describe(grid, i) {
    const block = data.blocks[grid.b];
    const here = [];
    if (its().closer) here.push(`${its().word} ${its().write(numbers(grid.k, grid.b)[i])}`);
    if (grid.t >= 0) {
      const values = block.values[grid.t];
      const give = values.error ? ` ± ${exact(2 * values.error[i])}` : '';
      here.push(`ratio ${exact(values.ratio[i])}${give}`, `variation ${scientific(values.variation[i])}`, `weight ${exact(values.weight[i])}`);
      if (values.fixed[i]) here.push('fixed');
    }
    if (block.excluded[i]) here.push('kept from pivot');
    return `${where(grid, block.row[i], block.column[i])}: ${here.join(', ')}`;
  }

  function drawLegend(node, span) {
    node.hidden = !span;
    if (!span) return;
    const steps = span[0] === span[1] ? [0] : span[0] === 0 && span[1] === 1 ? [0, 0.25, 0.5, 0.75, 1] : [0, 0.5, 1];
    const texts = steps.map((step) => {
      const v = span[0] + step * (span[1] - span[0]);
      const tick = its().tick || ((number) => String(+number.toPrecision(3)).replace('-', '−'));
      return tick(its().log ? 10 ** v : v);
    });
    const label = `Colour scale, ${unit()}, from ${texts[0]} to ${texts[texts.length - 1]}`;
    const bar = el('div', 'hm-bar', undefined, { role: 'img', 'aria-label': label });
    bar.style.backgroundImage = gradient(its().diverging);
    const ticks = el('div', 'hm-ticks', undefined, { 'aria-hidden': 'true' });
    ticks.append(...texts.map((text) => el('span', '', text)));
    const scaleBar = el('div', 'hm-ruler');
    scaleBar.append(bar, ticks);
    node.replaceChildren(el('span', 'hm-unit', unit()), scaleBar);
  }

  function drawKey() {
    const any = (test) => grids.some((grid) => test(data.blocks[grid.b], data.blocks[grid.b].values[grid.t]));
    const signs = [
      ['hm-fixed', 'fixed by you', any((_, values) => values?.fixed.includes(1))],
      ['hm-excluded', 'kept from pivot', any((block) => block.excluded.includes(1))],
      ['hm-missing', 'not in this layer', Boolean(cards.querySelector('.hm-missing:not(.hm-undefined)'))],
      ['hm-missing hm-undefined', 'undefined: nothing changed here', Boolean(cards.querySelector('.hm-undefined'))],
    ];
    key.replaceChildren(...signs.filter(([, , there]) => there).map(([name, text]) => {
      const item = el('span', 'hm-sign');
      item.append(el('i', `hm-cell ${name}`, undefined, { 'aria-hidden': 'true' }), el('span', '', text));
      return item;
    }));
  }

  // ---------------------------------------------------------------- sizes
  const HEAD = 34; // pixels, as are the others
  const GAP = 8; // a group's empty track and its two gutters
  const PADDING = 28;
  const ruler = document.createElement('canvas').getContext('2d');
  const pieces = (label) => label.split(/(?<=[_.])/);

  function fit() {
    width = root.clientWidth;
    const tables = data.blocks.filter((block) => block.layers);
    const most = Math.max(1, ...tables.map((block) => block.columns.length));
    const rows = Math.max(1, ...tables.map((block) => block.rows.length));
    const roomy = rows <= 16;
    const least = HEAD + PADDING + most * ((roomy ? 32 : 20) + 2) + 2 * GAP;
    let across = Math.max(1, Math.min(Math.floor((width + 14) / (least + 14)), shownCards().length));
    // Four are compared two by two when there is no room for all beside each other.
    if (across === 3 && shownCards().length === 4) across = 2;
    cards.style.gridTemplateColumns = `repeat(${across}, minmax(0, 1fr))`;
    const inner = (width - 14 * (across - 1)) / across - PADDING;
    const height = rows <= 8 ? 36 : roomy ? 26 : rows <= 48 ? 20 : 15;
    root.style.setProperty('--hm-height', `${height}px`);
    root.style.setProperty('--hm-mark', height > 20 ? '8px' : '5px');
    ruler.font = `11px ${getComputedStyle(root).fontFamily}`;
    for (const grid of grids) fitGrid(grid, inner, height);
  }

  function fitGrid(grid, inner, height) {
    const { columns, layers } = data.blocks[grid.b];
    const gaps = grid.tracks[columns.length - 1] - columns.length - 1;
    const free = (inner - HEAD - gaps * GAP) / columns.length - 2;
    const size = Math.floor(Math.max(layers ? 20 : 56, Math.min(free, layers ? 120 : 150)));
    const lines = [`${HEAD}px`];
    columns.forEach((column, c) => lines.push(...(c && column.group !== columns[c - 1].group ? ['6px'] : []), `${size}px`));
    grid.node.style.gridTemplateColumns = lines.join(' ');
    const longest = Math.max(...columns.flatMap(({ label }) => pieces(label)).map((text) => ruler.measureText(text).width));
    grid.node.classList.toggle('hm-upright', layers && longest > size + 1);
    grid.node.classList.toggle('hm-numbers', size >= (its().full && !its().diverging && !its().closer ? 20 : 26) && height >= 18);
  }

  // ---------------------------------------------------------------- editing
  // The cells an edit of (r, c) reaches: -1 stands for all of them, and what is kept from the pivot is left out.
  function chosen(grid, r, c) {
    const block = data.blocks[grid.b];
    return [...grid.cells.keys()].filter((i) => grid.cells[i] && !block.excluded[i]
      && (r < 0 || block.row[i] === r) && (c < 0 || block.column[i] === c));
  }

  function request(at, action, weight) {
    const { grid, r, c } = at;
    if (!editable(grid)) return;
    if (!chosen(grid, r, c).length) {
      live.textContent = `${where(grid, r, c)}: kept from pivot, nothing to edit`;
      return;
    }
    pending = { t: grid.t, b: grid.b, r, c };
    live.textContent = `${action} ${where(grid, r, c)} …`;
    send({ target: grid.t, block: grid.b, row: r < 0 ? null : r, column: c < 0 ? null : c, action, weight });
  }

  // Says what is there now, not what was asked for: the answer may be a refusal.
  function announce() {
    const grid = pending && grids.find((other) => other.t === pending.t && other.b === pending.b);
    if (!grid) return;
    const { r, c } = pending;
    pending = null;
    const i = places.get(grid.at[r + 1]?.[c + 1])?.i ?? -1;
    const cells = chosen(grid, r, c);
    const fixed = cells.filter((k) => data.blocks[grid.b].values[grid.t].fixed[k]).length;
    live.textContent = i >= 0 ? describe(grid, i) : `${where(grid, r, c)}: ${fixed} of ${cells.length} weights fixed`;
  }

  // ---------------------------------------------------------------- pointer and keyboard, delegated
  const target = (event) => event.target.closest?.('.hm-cell, .hm-layer, .hm-column, .hm-corner');

  function rove(node) {
    node.closest('[role=grid]').querySelector('[tabindex="0"]')?.setAttribute('tabindex', '-1');
    node.tabIndex = 0;
  }
  function edit(node) {
    tip.hide();
    rove(node);
    node.focus({ preventScroll: true });
    if (editor && editable(places.get(node).grid)) editor.open(places.get(node));
    else tip.show(node);
  }
  function step({ grid, r, c }, dr, dc) {
    const { at } = grid;
    for (r += dr + 1, c += dc + 1; at[r] && c in at[r]; r += dr, c += dc) if (at[r][c]) return at[r][c];
    return null;
  }
  function edge({ grid, r }, last, whole) {
    const rows = whole ? (last ? [...grid.at].reverse() : grid.at) : [grid.at[r + 1]];
    const row = rows[0].filter(Boolean);
    return row[last ? row.length - 1 : 0];
  }

  cards.addEventListener('pointerover', (event) => {
    const node = target(event);
    if (node && places.has(node)) tip.show(node); else tip.hide();
  });
  cards.addEventListener('pointerleave', tip.hide);
  cards.addEventListener('focusin', (event) => {
    const node = target(event);
    if (node && places.has(node)) { rove(node); tip.show(node); }
  });
  cards.addEventListener('focusout', tip.hide);
  cards.addEventListener('click', (event) => {
    const node = target(event);
    if (node && places.has(node)) edit(node);
  });
  cards.addEventListener('keydown', (event) => {
    const node = target(event);
    const at = node && places.get(node);
    if (!at || event.altKey || event.metaKey) return;
    const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const home = event.key === 'Home' || event.key === 'End';
    if (event.ctrlKey && !home) return;
    if (arrows) step(at, ...arrows)?.focus();
    else if (home) edge(at, event.key === 'End', event.ctrlKey)?.focus();
    else if (event.key === 'Enter' || event.key === ' ') edit(node);
    else if (event.key === 'Escape') tip.hide();
    else if (send && event.key.toLowerCase() === 'l') request(at, 'lock', null);
    else if (send && (event.key.toLowerCase() === 'r' || event.key === 'Delete')) request(at, 'reset', null);
    else return;
    event.preventDefault();
  });

  // ---------------------------------------------------------------- the door
  function update(value) {
    if (value && !value.blocks && !value.waiting) return; // no value of ours: what is shown stays
    data = value && value.targets?.length && value.blocks?.length ? value : null;
    empty.hidden = Boolean(data);
    empty.textContent = value?.waiting || NOTHING;
    for (const node of [toolbar, hint, cards, key]) node.hidden = !data;
    if (!data) { tip.hide(); cards.replaceChildren(); notice.hidden = true; structure = ''; return; }
    draw();
    announce();
  }
  function draw() {
    const shape = JSON.stringify([shownCards().map(({ name, letters, colors, target }) => [name, letters, colors, target]),
      data.blocks.map((block) => [block.title, block.rows, block.columns, block.row, block.column,
        block.values.map((values) => values.present)])]);
    if (shape !== structure) {
      tip.hide();
      if (editor?.node.open) editor.node.close();
      structure = shape;
      build();
    }
    paint();
    tip.again();
  }
  return { update };
}
