"""The page's only script: values under the pointer or the arrow keys, and a text through time.

What it shows stands in tables and labels already; without it nothing is lost but the convenience.
"""

SCRIPT = r"""
'use strict';
const make = (tag, kind) => Object.assign(document.createElement(tag), { className: kind });

for (const figure of document.querySelectorAll('figure.read')) {
  const svg = figure.querySelector('svg');
  const rows = [...figure.querySelectorAll('tr[data-x]')];
  if (!svg || !rows.length) continue;
  const heads = [...figure.querySelectorAll('thead th')].map(th => th.textContent);
  const shades = [...figure.querySelectorAll('thead th')].map(th => th.dataset.s);
  const box = svg.viewBox.baseVal, svgNS = svg.namespaceURI;
  const tip = make('div', 'tip'); tip.hidden = true; tip.setAttribute('aria-hidden', 'true');
  const said = make('p', 'unseen'); said.setAttribute('role', 'status');
  const hair = document.createElementNS(svgNS, 'g'); svg.append(hair);
  const plot = figure.querySelector('.plot'); plot.append(tip); figure.append(said);
  let now = -1;
  const hide = () => { tip.hidden = true; hair.replaceChildren(); now = -1; };
  const show = (i, aloud) => {
    now = i;
    const row = rows[i], x = +row.dataset.x, cells = [...row.children];
    hair.replaceChildren();
    const line = document.createElementNS(svgNS, 'line');
    for (const [k, v] of [['x1', x], ['x2', x], ['y1', 10], ['y2', box.height - 40]])
      line.setAttribute(k, v);
    line.setAttribute('class', 'hair'); hair.append(line);
    tip.replaceChildren();
    const head = make('b', ''); head.textContent = heads[0] + ' ' + cells[0].textContent;
    tip.append(head);
    const words = [head.textContent];
    cells.slice(1).map((cell, j) => [cell, j + 1]).filter(([cell]) => cell.textContent)
      .forEach(([cell, j]) => {
        const item = make('span', 'k' + shades[j]);
        const name = make('i', ''); name.textContent = heads[j];
        item.append(name, ' ' + cell.textContent); tip.append(item);
        words.push(heads[j] + ': ' + cell.textContent);
        if (cell.dataset.y) {
          const dot = document.createElementNS(svgNS, 'circle');
          dot.setAttribute('cx', x); dot.setAttribute('cy', cell.dataset.y);
          dot.setAttribute('r', 4); dot.setAttribute('class', 'dot k' + shades[j]);
          hair.append(dot);
        }
      });
    tip.hidden = false;
    const at = x / box.width;
    tip.style.left = at < .5 ? (at * 100) + '%' : 'auto';
    tip.style.right = at < .5 ? 'auto' : ((1 - at) * 100) + '%';
    if (aloud) said.textContent = words.join('; ');
  };
  const nearest = event => {
    const area = svg.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width * box.width;
    let best = 0;
    rows.forEach((row, i) => {
      if (Math.abs(row.dataset.x - x) < Math.abs(rows[best].dataset.x - x)) best = i; });
    show(best, false);
  };
  plot.tabIndex = 0;
  plot.setAttribute('role', 'group');
  plot.setAttribute('aria-label', 'Chart; arrow keys read its values');
  svg.addEventListener('pointermove', nearest);
  svg.addEventListener('pointerdown', nearest);
  svg.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', event => {
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: rows.length - 1 };
    if (event.key === 'Escape') return hide();
    if (!(event.key in to)) return;
    event.preventDefault();
    show(Math.min(rows.length - 1, Math.max(0, to[event.key])), true);
  });
}

for (const held of document.querySelectorAll('.held')) {
  const data = JSON.parse(held.querySelector('script').textContent);
  const tokens = [...held.querySelectorAll('.text span')];
  const time = held.querySelector('input'), layer = held.querySelector('select');
  const told = held.querySelector('output'), named = held.querySelector('.named');
  const code = c => { const n = c.charCodeAt(0); return n - 35 - (n > 92); };
  const chosen = () => data.lists.filter(l => layer.value === '' || l[0] === layer.value);
  const share = (i, t, lists) => {
    if (i >= data.looks[t]) return -1;
    return lists.reduce((sum, l) => sum + (code(l[1][i]) > t ? 1 : 0), 0) / lists.length;
  };
  let focus = -1;
  const describe = i => {
    const lists = chosen(), held = lists.filter(l => code(l[1][i]) >= data.looks.length).length;
    const lived = lists.map(l => code(l[1][i])).sort((a, b) => a - b)[lists.length >> 1];
    const gone = lived >= data.looks.length ? 'still held by most' : 'gone from most after '
      + data.looks[lived].toLocaleString('en') + ' tokens';
    return JSON.stringify(data.tokens[i]) + ', token ' + (i + 1) + ': ' + gone + '; at the end '
      + held + ' of ' + lists.length + ' lists hold it';
  };
  const draw = () => {
    const t = +time.value, lists = chosen();
    tokens.forEach((span, i) => {
      const part = share(i, t, lists);
      span.className = part < 0 ? 'later' : 'q' + Math.ceil(part * 5 - 1e-9);
    });
    if (focus >= 0) tokens[focus].classList.add('on');
    told.textContent = data.looks[t].toLocaleString('en') + ' tokens read';
  };
  const point = i => {
    focus = Math.min(tokens.length - 1, Math.max(0, i)); named.textContent = describe(focus);
    draw(); tokens[focus].scrollIntoView({ block: 'nearest' });
  };
  time.addEventListener('input', draw); layer.addEventListener('change', draw);
  held.querySelector('.controls').hidden = false;
  const text = held.querySelector('.text');
  text.addEventListener('pointerover', event => {
    const i = tokens.indexOf(event.target);
    if (i >= 0) { focus = i; named.textContent = describe(i); draw(); } });
  text.addEventListener('keydown', event => {
    const to = { ArrowRight: focus + 1, ArrowLeft: focus - 1, Home: 0, End: tokens.length - 1 };
    if (event.key in to) { event.preventDefault(); point(to[event.key]); } });
  for (const map of held.querySelectorAll('svg[data-map]')) {
    const box = map.viewBox.baseVal, wide = tokens.length;
    map.addEventListener('pointermove', event => {
      const area = map.getBoundingClientRect();
      const x = (event.clientX - area.left) / area.width * box.width;
      const i = Math.floor(x / box.width * wide);
      if (i >= 0 && i < wide) named.textContent = describe(i); });
  }
  draw();
}
""".strip()
