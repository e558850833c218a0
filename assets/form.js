// Draws the form of components/form.py into `root`; `send({field, value})` carries a change to Python. Returns {update(value)}.
// Data enters the page only as text and attributes, never as markup.
function fuseForm(root, send) {
  'use strict';

  const el = (tag, name, text, attributes) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    return node;
  };
  const WAYS = { value: 'Number', variation: 'Measured', curve: 'By layer', table: 'By pattern' };
  let data = null;
  let shape = ''; // what the form is built of; values alone are refreshed only where nobody is typing

  const isCurve = (value) => Boolean(value && value.curve);
  const isTable = (value) => Boolean(value && value.table);
  const way = (value) => isCurve(value) ? 'curve' : isTable(value) ? 'table' : value === 'variation' ? 'variation' : 'value';
  const short = (value) => isCurve(value) ? `${value.curve[0]} … ${value.curve.at(-1)}` : isTable(value) ? 'by pattern'
    : Array.isArray(value) ? value.map(short).join(' / ') : value === true ? 'on' : value === false ? 'off'
    : typeof value === 'number' ? String(Number(value.toPrecision(4))) : String(value);

  function patterns(value) {
    return value.table.map((row) => `${row.tensors} = ${isCurve(row.value) ? row.value.curve.join(', ') : row.value}`).join('\n');
  }
  function number(value, fallback) {
    if (typeof value === 'number') return value;
    if (isCurve(value)) return value.curve[0];
    return fallback;
  }

  function build() {
    const parts = [];
    if (data.problem) parts.push(el('p', 'fm-problem', data.problem, { role: 'status' }));
    if (data.stages.length) parts.push(strip());
    if (data.weights) parts.push(weights());
    parts.push(...data.fields.map(field));
    if (!data.fields.length && !data.weights) parts.push(el('p', 'fm-none', 'This method has nothing to set.'));
    root.replaceChildren(...parts);
  }

  function strip() {
    const list = el('ol', 'fm-strip', undefined, { 'aria-label': 'Stages of this method, in order' });
    for (const stage of data.stages) {
      const item = el('li');
      item.append(el('b', '', stage.title));
      const values = stage.fields.map((name) => data.fields.find((field) => field.name === name)).filter(Boolean);
      if (stage.title === 'weigh' && data.weights) item.append(el('span', '', data.weights.values.map(short).join(' / ')));
      for (const its of values) item.append(el('span', '', values.length > 1 ? `${its.label} ${short(its.value)}` : short(its.value)));
      if (values.some((its) => its.kind === 'flag' && its.value === false)) item.className = 'fm-off';
      list.append(item);
    }
    return list;
  }

  function row(label, hint) {
    const node = el('div', 'fm-row');
    const head = el('div', 'fm-head');
    head.append(label);
    node.append(head);
    if (hint) node.append(el('p', 'fm-hint', hint));
    return { node, head };
  }

  function weights() {
    const { kind, measured, values } = data.weights;
    const box = el('div', 'fm-weights');
    const about = kind === 'shares' ? 'Shares: they are divided by their sum.' : 'Factors of the targets’ changes; 1 is the change as it is.';
    const top = row(el('b', '', 'Weights'), about);
    if (data.weights.changed) top.head.append(small('Reset', 'Back to what the method does by itself', () => send({ field: 'weights', value: null })));
    box.append(top.node);
    const limits = { name: 'weights', low: null, high: null, kind: 'number', default: 1 };
    values.forEach((value, j) => {
      const target = data.targets[j];
      const name = el('span', 'fm-target');
      const dot = el('i');
      dot.style.backgroundColor = target.color;
      name.append(dot, el('b', '', target.letter), el('span', '', target.name));
      const change = (next) => send({ field: 'weights', value: values.map((old, k) => k === j ? next : old) });
      const its = { ...limits, low: kind === 'shares' ? 0 : null, label: `Weight of ${target.letter}`, id: `fm-weight-${j}` };
      box.append(setting(its, value, change, name, ['value', 'variation', 'curve', 'table'], measured));
    });
    return box;
  }

  function field(its) {
    const label = el('b', '', its.label);
    if (its.kind !== 'number' && its.kind !== 'integer') return plainField(its, label);
    const change = (value) => send({ field: its.name, value });
    const ways = its.kind === 'number' ? ['value', 'curve', 'table'] : ['value'];
    const several = its.perTarget && data.targets.length > 1;
    if (!Array.isArray(its.value)) {
      const node = setting({ ...its, id: `fm-${its.name}` }, its.value, change, label, ways, false, its.text);
      if (several) {
        node.querySelector('.fm-head').append(small('Per target', 'One value for each target',
          () => change(data.targets.map(() => its.value))));
      }
      return node;
    }
    const top = row(label, its.text);
    top.head.append(small('One for all', 'The same value for all targets', () => change(its.value[0])));
    its.value.forEach((value, j) => {
      const set = (next) => change(its.value.map((old, k) => k === j ? next : old));
      const letter = el('span', 'fm-target');
      const dot = el('i');
      dot.style.backgroundColor = data.targets[j].color;
      letter.append(dot, el('b', '', data.targets[j].letter), el('span', '', data.targets[j].name));
      top.node.append(setting({ ...its, label: `${its.label} of ${data.targets[j].letter}`, id: `fm-${its.name}-${j}` }, value, set, letter, ways));
    });
    return top.node;
  }

  function plainField(its, label) {
    const { node, head } = row(label, its.text);
    const change = (value) => send({ field: its.name, value });
    if (its.kind === 'flag') {
      const input = el('input', '', undefined, { type: 'checkbox', id: `fm-${its.name}`, 'aria-label': its.label });
      input.checked = its.value === true;
      if (isTable(its.value)) input.indeterminate = true;
      input.addEventListener('change', () => change(input.checked));
      head.append(input);
    } else {
      const input = el('select', '', undefined, { id: `fm-${its.name}`, 'aria-label': its.label });
      for (const choice of its.choices) input.append(el('option', '', choice, { value: choice }));
      input.value = its.value;
      input.addEventListener('change', () => change(input.value));
      head.append(input);
    }
    return node;
  }

  // One setting: its name, how it is given, and the editor for that.
  function setting(its, value, change, label, ways, ownIsMeasured, hint) {
    const { node, head } = row(label, hint);
    node.classList.add('fm-setting');
    const now = way(value);
    const right = el('span', 'fm-right');
    if (now === 'value') right.append(numberBox(its, value, change));
    if (now === 'variation') right.append(el('span', 'fm-measured', 'share of variation'));
    if (ways.length > 1) right.append(wayMenu(its, value, change, ways, now));
    head.append(right);
    if (now === 'curve') {
      node.append(fuseCurve(its, value.curve, data.layers, (points) => change({ ...value, curve: points })));
    }
    if (now === 'table') node.append(patternBox(its, value, change));
    return node;
  }

  function numberBox(its, value, change) {
    const range = its.low !== null && its.high !== null;
    const step = its.kind === 'integer' ? 1 : range ? (its.high - its.low) / 100 : 'any';
    const input = el('input', '', undefined, { type: 'number', id: its.id, step: 'any', 'aria-label': its.label });
    if (its.low !== null) input.min = its.low;
    if (its.high !== null) input.max = its.high;
    input.value = number(value, '');
    const commit = () => { if (input.value !== '' && Number(input.value) !== value) change(Number(input.value)); };
    input.addEventListener('change', commit);
    const both = el('span', 'fm-number');
    if (range && its.kind === 'number') {
      const slider = el('input', '', undefined, { type: 'range', min: its.low, max: its.high, step, 'aria-label': `${its.label}, slider` });
      slider.value = number(value, its.low);
      slider.addEventListener('input', () => { input.value = slider.value; });
      slider.addEventListener('change', commit);
      both.append(slider);
    }
    both.append(input);
    return both;
  }

  function wayMenu(its, value, change, ways, now) {
    const menu = el('select', 'fm-way', undefined, { 'aria-label': `How ${its.label} is given` });
    for (const name of ways) menu.append(el('option', '', WAYS[name], { value: name }));
    menu.value = now;
    menu.addEventListener('change', () => {
      const start = number(value, its.default ?? 1);
      if (menu.value === 'value') change(start);
      if (menu.value === 'variation') change('variation');
      if (menu.value === 'curve') change({ curve: [start, start, start, start, start] });
      if (menu.value === 'table') change({ patterns: `* = ${start}` });
    });
    return menu;
  }

  function patternBox(its, value, change) {
    const box = el('div', 'fm-patterns');
    const text = el('textarea', '', undefined, { rows: Math.min(8, value.table.length + 1), spellcheck: 'false', 'aria-label': `${its.label} by pattern` });
    text.value = patterns(value);
    text.addEventListener('change', () => change({ patterns: text.value }));
    box.append(text, el('p', 'fm-hint', 'One row a line, the last that matches wins: *.mlp.* = 0.5, or * = 0, 0.5, 1 for a curve.'));
    return box;
  }

  function small(label, title, act) {
    const node = el('button', 'fm-small', label, { type: 'button', title });
    node.addEventListener('click', act);
    return node;
  }

  function update(value) {
    if (!value || !value.fields) { root.replaceChildren(); return; }
    const now = JSON.stringify(value);
    if (now === shape) return;
    const held = document.activeElement;
    const kept = held && root.contains(held) ? { id: held.id, label: held.getAttribute('aria-label'), point: held.dataset.point } : null;
    shape = now;
    data = value;
    build();
    if (!kept) return;
    const again = [...root.querySelectorAll('input, select, textarea, [role=slider]')].find((node) => kept.point !== undefined
      ? node.dataset.point === kept.point && node.getAttribute('aria-label') === kept.label
      : kept.id ? node.id === kept.id : node.getAttribute('aria-label') === kept.label);
    again?.focus({ preventScroll: true });
  }

  return { update };
}
