/** The frame of a report: its style, and the script that switches, enlarges, reads out and renews. */

import { type Html, html, raw } from './report-html.ts';

export interface Page {
  readonly title: string;
  readonly body: Html;
  /** Seconds after which the page loads itself again; without it never. */
  readonly everySeconds?: number;
  /** Seconds without news after which it says so. */
  readonly quietSeconds?: number;
}

/** Nothing is fetched, whatever a page is made to contain. */
const POLICY =
  "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

export function pageHtml({ title, body, everySeconds, quietSeconds }: Page): string {
  const live = everySeconds !== undefined && html` data-every="${everySeconds}" data-quiet="${quietSeconds}"`;
  return html`<!doctype html>
<html lang="en"${live}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="${raw(POLICY)}">
<title>${title}</title>
<link rel="icon" href="data:,">
<style>${raw(STYLE)}</style>
</head>
<body>
${body}
<script>${raw(SCRIPT)}</script>
</body>
</html>
`.html;
}

const STYLE = `
:root {
  --paper: #f5f5f2; --card: #ffffff; --ink: #1b1d1c; --soft: #636863; --rule: #e3e4df; --sunk: #eeefea;
  --accent: #0b7a6f; --on-accent: #ffffff; --wash: rgba(11, 122, 111, .13); --range: rgba(11, 122, 111, .26);
  --bad: #b3261e; --bad-wash: #fbeae8; --wait: #8a5a00; --shadow: 0 1px 2px rgba(20, 24, 22, .05);
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #101312; --card: #181c1b; --ink: #e9ecea; --soft: #98a19d; --rule: #29302d; --sunk: #222826;
    --accent: #45cdb9; --on-accent: #06201c; --wash: rgba(69, 205, 185, .15); --range: rgba(69, 205, 185, .28);
    --bad: #ff8a80; --bad-wash: #35191a; --wait: #e8b45a; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1240px; padding: 32px 28px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased;
}
h1, h2, h3, p, ul, ol, dl, dd, figure, pre { margin: 0; padding: 0; }
ul, ol { list-style: none; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.02em; font-weight: 680; overflow-wrap: anywhere; }
h2 { font-size: 16px; line-height: 1.4; font-weight: 640; letter-spacing: -.005em; }
h3 { font-size: 14px; line-height: 1.4; font-weight: 620; overflow-wrap: anywhere; }
h2 small, .prompt small { font-weight: 400; font-size: 13px; color: var(--soft); margin-left: 6px; }
a { color: var(--accent); }
code, pre { font: 12.5px/1.6 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
[hidden] { display: none !important; }

header { margin-bottom: 24px; }
.top { display: flex; align-items: center; gap: 8px 14px; flex-wrap: wrap; }
.state { display: inline-flex; align-items: center; gap: 7px; padding: 3px 11px 3px 9px; border-radius: 99px; font-size: 13px; font-weight: 600; background: var(--sunk); color: var(--soft); }
.state::before { content: ""; width: 8px; height: 8px; border-radius: 50%; background: currentColor; }
.state.running, .state.finished { background: var(--wash); color: var(--accent); }
.state.failed { background: var(--bad-wash); color: var(--bad); }
.state.quiet, .state.interrupted { color: var(--wait); background: var(--sunk); }
@media (prefers-reduced-motion: no-preference) {
  .state.running::before { animation: breathe 2s ease-in-out infinite; }
  @keyframes breathe { 50% { opacity: .3; } }
}
.facts { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 20px; margin-top: 8px; color: var(--soft); font-size: 14px; }
.message { margin-top: 14px; padding: 11px 15px; border-radius: 9px; background: var(--sunk); overflow-wrap: anywhere; white-space: pre-wrap; }
.message.failed { background: var(--bad-wash); color: var(--bad); }

section { min-width: 0; }
h1, h3, dt, .controls { min-width: 0; }
main, .charts { display: grid; gap: 18px; grid-template-columns: minmax(0, 1fr); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px; box-shadow: var(--shadow); min-width: 0; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { padding: 14px 18px 13px; }
.tile h2 { font-size: 13px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile .value { font-size: 25px; line-height: 1.35; font-weight: 620; letter-spacing: -.02em; white-space: nowrap; }
.value small { font-size: 14px; font-weight: 450; letter-spacing: 0; color: var(--soft); }
.about { font-size: 13px; color: var(--soft); min-height: 1.5em; }

.stages { margin-top: 10px; display: grid; gap: 11px; }
.stages li { display: grid; grid-template-columns: minmax(90px, 160px) minmax(60px, 1fr) minmax(120px, auto) 132px; gap: 4px 18px; align-items: center; }
.stages b { font-weight: 560; overflow-wrap: anywhere; }
.stages .track { height: 7px; border-radius: 4px; background: var(--sunk); overflow: hidden; }
.stages .track i { display: block; height: 100%; border-radius: 4px; background: var(--accent); }
.stages .done .track i { opacity: .45; }
.stages .steps, .stages .left { text-align: right; font-size: 14px; white-space: nowrap; }
.stages small { font-size: 14px; color: var(--soft); }
.stages .left, .stages .waiting { color: var(--soft); }
.stages .current .left { color: var(--ink); }

.bar { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: 10px 18px; margin: 8px 2px 12px; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 10px 18px; }
fieldset { border: 0; margin: 0; padding: 3px; display: flex; flex-wrap: wrap; border-radius: 9px; background: var(--sunk); min-width: 0; }
legend, .controls input[type=radio] { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); opacity: 0; }
fieldset label span { display: block; max-width: 190px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding: 4px 12px; border-radius: 7px; font-size: 13.5px; color: var(--soft); cursor: pointer; }
fieldset input:checked + span { background: var(--card); color: var(--ink); font-weight: 560; box-shadow: 0 1px 2px rgba(0, 0, 0, .12); }
fieldset input:focus-visible + span { outline: 2px solid var(--accent); outline-offset: 1px; }
.switch, .live { display: inline-flex; align-items: center; gap: 8px; font-size: 13.5px; color: var(--soft); cursor: pointer; padding: 4px 0; }
.switch input, .live input { appearance: none; width: 30px; height: 18px; margin: 0; border-radius: 9px; background: var(--rule); position: relative; cursor: pointer; flex: none; box-shadow: inset 0 0 0 1px rgba(128, 128, 128, .25); }
.switch input::before, .live input::before { content: ""; position: absolute; width: 14px; height: 14px; left: 2px; top: 2px; border-radius: 50%; background: var(--card); box-shadow: 0 1px 2px rgba(0, 0, 0, .3); }
.switch input:checked, .live input:checked { background: var(--accent); }
.switch input:checked::before, .live input:checked::before { left: 14px; }

.charts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
#chart-loss { grid-column: 1 / -1; }
.chart { padding: 15px 18px 12px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; min-height: 24px; margin-bottom: 10px; }
figcaption p { font-size: 13px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 12.5px; color: var(--soft); width: 100%; margin-top: 3px; }
.legend li { display: flex; align-items: center; gap: 6px; }
.legend i { width: 13px; height: 3px; border-radius: 2px; background: var(--accent); }
.legend li:first-child { color: var(--ink); font-weight: 560; }
.plot { padding-left: 46px; padding-right: 4px; }
.area { position: relative; height: 190px; touch-action: pan-y; cursor: crosshair; }
#chart-loss .area { height: 290px; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.area path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.area .grid { stroke: var(--rule); stroke-width: 1; stroke-linecap: butt; }
.area .range { stroke: var(--range); stroke-width: 1; stroke-linejoin: bevel; }
.area .line { stroke: var(--accent); stroke-width: 2; }
.area .marks { stroke: var(--accent); stroke-width: 5; }
.area .y { position: absolute; right: 100%; margin-right: 9px; transform: translateY(50%); font-size: 11.5px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .x { position: relative; height: 22px; font-size: 11.5px; color: var(--soft); }
.x span { position: absolute; top: 7px; line-height: 1; transform: translateX(-50%); white-space: nowrap; }
.staged { padding-top: 17px; }
.area .stage { position: absolute; top: -17px; bottom: 0; border-left: 1px dashed var(--soft); overflow: hidden; }
.area .first { border-left-color: transparent; }
.area .first b { padding-left: 0; }
.area .stage b { display: block; padding: 0 6px; line-height: 15px; font-size: 11.5px; font-weight: 500; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.cursor, .dot, .tip { position: absolute; visibility: hidden; pointer-events: none; }
.cursor { top: 0; bottom: 0; width: 1px; background: var(--soft); opacity: .6; }
.dot { width: 10px; height: 10px; margin: -5px; border-radius: 50%; background: var(--accent); border: 2px solid var(--card); }
.reads .cursor, .reads .dot, .reads .tip { visibility: visible; }
.tip { z-index: 2; top: 4px; padding: 7px 11px; border-radius: 8px; background: var(--ink); color: var(--card); font-size: 12.5px; line-height: 1.5; white-space: nowrap; max-width: 100%; overflow: hidden; box-shadow: 0 4px 14px rgba(0, 0, 0, .2); }
.tip b { display: block; overflow: hidden; text-overflow: ellipsis; font-weight: 450; opacity: .75; }
.tip span { display: flex; justify-content: space-between; gap: 14px; }
.tip i { font-style: normal; opacity: .75; }
.empty { padding: 60px 0; text-align: center; color: var(--soft); font-size: 13.5px; }

.scroll { overflow-x: auto; margin: 10px -20px 0; padding: 0 20px 6px; }
.samples { border-collapse: separate; border-spacing: 8px 0; margin: 0 -8px; font-size: 13px; }
.samples th { font-weight: 400; text-align: left; color: var(--soft); padding: 0 0 2px; line-height: 1.35; white-space: nowrap; }
.samples thead th { max-width: 148px; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
.samples thead b { color: var(--ink); font-weight: 560; }
.samples tbody th { padding: 12px 0 7px; color: var(--ink); }
.prompt { position: sticky; left: 0; display: inline-block; max-width: min(1140px, calc(100vw - 76px)); white-space: normal; overflow-wrap: anywhere; font-size: 14px; }
.samples td { padding: 0; vertical-align: top; }
.samples button { display: block; border: 0; padding: 0; background: var(--sunk); border-radius: 8px; overflow: hidden; cursor: zoom-in; }
.samples img { display: block; width: 148px; height: auto; }
.samples button:focus-visible { border-radius: 8px; }
.gone { display: grid; place-items: center; width: 148px; min-height: 100px; border-radius: 8px; background: var(--sunk); color: var(--soft); }
dialog { border: 0; padding: 0; max-width: 94vw; max-height: 94vh; background: transparent; color: #f2f4f3; text-align: center; overflow: visible; }
dialog::backdrop { background: rgba(8, 10, 9, .88); }
dialog img { display: block; margin: 0 auto; max-width: 94vw; max-height: 78vh; width: 640px; height: auto; object-fit: contain; border-radius: 10px; }
dialog p { margin-top: 10px; font-size: 14px; overflow-wrap: anywhere; }
dialog .keys { display: flex; justify-content: center; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: #aab2ae; }
dialog a { color: #7fe3d4; }
dialog .close { position: fixed; top: 12px; right: 14px; width: 44px; height: 44px; border: 0; border-radius: 50%; background: rgba(255, 255, 255, .14); color: #fff; font-size: 24px; line-height: 1; cursor: pointer; }
@media (hover: none) { .keys span { display: none; } }

.notes { margin-top: 8px; max-height: 340px; overflow-y: auto; }
.notes li { padding: 9px 0; border-top: 1px solid var(--rule); }
.notes li:first-child { border-top: 0; padding-top: 2px; }
.notes p { font-size: 12.5px; color: var(--soft); }
.notes pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
summary { cursor: pointer; list-style: none; display: flex; align-items: center; gap: 9px; }
summary::-webkit-details-marker { display: none; }
summary::before { content: ""; flex: none; width: 7px; height: 7px; margin-left: 2px; border: solid var(--soft); border-width: 0 1.8px 1.8px 0; transform: rotate(-45deg); }
[open] > summary::before { transform: translateY(-2px) rotate(45deg); }
.list { border-collapse: collapse; width: 100%; font-size: 13.5px; }
.list th { text-align: left; font-weight: 500; font-size: 12.5px; color: var(--soft); }
.list th, .list td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
.list tbody tr:last-child td { border-bottom: 0; }
.list .number { text-align: right; }
.list td:last-child, .list th:last-child { width: 100%; padding-right: 0; }
pre.scroll { white-space: pre; }
.settings { columns: 2; column-gap: 40px; margin-top: 4px; }
.group { break-inside: avoid; padding-top: 14px; }
.group h3 { padding-bottom: 4px; }
.settings dl > div { display: flex; justify-content: space-between; gap: 20px; padding: 4px 0; border-top: 1px solid var(--rule); font-size: 13.5px; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { text-align: right; overflow-wrap: anywhere; min-width: 0; white-space: pre-wrap; }

@media (max-width: 760px) {
  body { padding: 20px 14px 48px; }
  h1 { font-size: 23px; }
  main, .charts { gap: 12px; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  .card { padding: 14px 15px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .tile { padding: 11px 15px; }
  .tile .value { font-size: 22px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .stages { gap: 15px; }
  .stages li { grid-template-columns: minmax(0, 1fr) auto; }
  .stages .track { grid-column: 1 / -1; grid-row: 2; }
  .stages .steps { grid-row: 1; grid-column: 2; }
  .stages .left { grid-row: 3; grid-column: 1 / -1; text-align: left; font-size: 13px; }
  .chart { padding: 13px 13px 8px; }
  .plot { padding-left: 40px; }
  .area .y { margin-right: 6px; }
  #chart-loss .area { height: 230px; }
  .area { height: 170px; }
  .scroll { margin: 8px -15px 0; padding: 0 15px 6px; }
  .samples img, .gone { width: 116px; }
  .prompt { max-width: calc(100vw - 62px); }
  .settings { columns: 1; }
  fieldset label span { padding: 7px 11px; }
}
@media print { body { max-width: none; } .controls, .live { display: none; } .card { break-inside: avoid; } }
`;

/** Plain JavaScript: the page has no other code. It keeps what was chosen over its reloads. */
const SCRIPT = `
(() => {
  'use strict';
  const root = document.documentElement;
  const all = (selector, of = document) => [...of.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const key = 'training-report:' + location.pathname;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(key)) || {}; } catch {}

  // Which stage, which scale.
  const log = byId('log');
  const views = all('input[name=view]');
  const chosenView = () => (views.find((input) => input.checked) || { value: 'all' }).value;
  const applyChoice = () => {
    const view = chosenView();
    const scale = log.checked ? 'log' : 'linear';
    for (const plot of all('[data-view]')) {
      plot.hidden = plot.dataset.view !== view || (plot.dataset.scale !== undefined && plot.dataset.scale !== scale);
    }
  };
  for (const input of views) if (input.value === kept.view) input.checked = true;
  log.checked = Boolean(kept.log);
  for (const input of [...views, log]) input.addEventListener('change', applyChoice);
  applyChoice();

  // Times as they are written here.
  for (const time of all('time:not([data-ago])')) {
    const date = new Date(time.dateTime);
    if (!Number.isNaN(date.getTime())) {
      time.textContent = date.toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
    }
  }

  // Read-out: pointer or arrow keys.
  let lastRead = 0;
  for (const area of all('.area')) {
    let columns;
    let at = -1;
    const [cursor, dot, tip] = ['.cursor', '.dot', '.tip'].map((name) => area.querySelector(name));
    const isLog = area.parentElement.dataset.scale === 'log';
    const load = () => (columns = columns || JSON.parse(byId(area.dataset.hover).textContent).sort((a, b) => a[0] - b[0]));
    const show = (index) => {
      at = index;
      const [x, linear, logarithmic, title, rows] = columns[index];
      area.classList.add('reads');
      cursor.style.left = dot.style.left = x / 10 + '%';
      dot.style.bottom = (isLog ? logarithmic : linear) / 10 + '%';
      const heading = document.createElement('b');
      heading.textContent = title;
      tip.replaceChildren(heading, ...rows.map(([name, value]) => {
        const row = document.createElement('span');
        const label = document.createElement('i');
        label.textContent = name;
        row.append(label, value);
        return row;
      }));
      const width = area.clientWidth;
      const wanted = (x / 1000) * width;
      const left = wanted + 14 + tip.offsetWidth > width ? wanted - 14 - tip.offsetWidth : wanted + 14;
      tip.style.left = Math.max(-40, Math.min(left, width - tip.offsetWidth)) + 'px';
      lastRead = Date.now();
    };
    const hide = () => area.classList.remove('reads');
    const point = (event) => {
      load();
      const box = area.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 1000;
      let low = 0;
      let high = columns.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (columns[middle][0] < x) low = middle + 1;
        else high = middle;
      }
      if (low > 0 && x - columns[low - 1][0] < columns[low][0] - x) low--;
      show(low);
    };
    area.addEventListener('pointermove', point);
    area.addEventListener('pointerdown', point);
    area.addEventListener('pointerleave', hide);
    area.addEventListener('blur', hide);
    area.addEventListener('keydown', (event) => {
      load();
      const last = columns.length - 1;
      const far = Math.max(1, Math.round(last / 10));
      const from = at < 0 ? last + 1 : at;
      const to = { ArrowLeft: from - 1, ArrowRight: from + 1, PageUp: from - far, PageDown: from + far, Home: 0, End: last }[event.key];
      if (event.key === 'Escape') hide();
      if (to === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(last, to)));
    });
  }

  // Sample pictures: the newest in sight, and larger ones.
  const strip = byId('sample-scroll');
  if (strip) strip.scrollLeft = kept.strip === undefined ? strip.scrollWidth : kept.strip;
  const viewer = byId('viewer');
  if (viewer) {
    const rows = all('.shots').map((row) => [...row.children].map((cell) => cell.querySelector('button')));
    let row = 0;
    let column = 0;
    const show = () => {
      const button = rows[row][column];
      const small = button.firstElementChild;
      const large = byId('viewer-picture');
      large.src = small.src;
      large.alt = small.alt;
      large.width = small.getAttribute('width');
      large.height = small.getAttribute('height');
      large.style.aspectRatio = large.width + '/' + large.height;
      byId('viewer-text').textContent = button.dataset.place + ' · ' + small.alt;
      byId('viewer-file').href = button.dataset.file;
    };
    const move = (down, right) => {
      let [r, c] = [row + down, column + right];
      while (rows[r] && c >= 0 && c < rows[r].length && !rows[r][c]) { r += down; c += right; }
      if (!rows[r] || !rows[r][c]) return;
      [row, column] = [r, c];
      show();
    };
    rows.forEach((buttons, r) => buttons.forEach((button, c) => {
      if (button) button.addEventListener('click', () => { [row, column] = [r, c]; show(); viewer.showModal(); });
    }));
    viewer.addEventListener('click', (event) => { if (event.target === viewer || event.target.id === 'viewer-picture') viewer.close(); });
    byId('viewer-close').addEventListener('click', () => viewer.close());
    viewer.addEventListener('keydown', (event) => {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!way) return;
      event.preventDefault();
      move(...way);
    });
  }

  // Where one was.
  for (const details of all('details')) {
    if (kept.open && kept.open[details.id] !== undefined) details.open = kept.open[details.id];
  }
  const live = byId('live');
  if (live) live.checked = kept.live !== false;
  if (kept.scroll) {
    history.scrollRestoration = 'manual';
    scrollTo(0, kept.scroll);
  }
  const keep = () => {
    const state = {
      view: chosenView(),
      log: log.checked,
      live: !live || live.checked,
      scroll: scrollY,
      open: Object.fromEntries(all('details').map((details) => [details.id, details.open])),
    };
    // At its end it stays at its end.
    if (strip && strip.scrollLeft + strip.clientWidth < strip.scrollWidth - 8) state.strip = strip.scrollLeft;
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch {}
  };
  addEventListener('pagehide', keep);

  // News: by loading the file again, but not under somebody's hands.
  const every = Number(root.dataset.every);
  if (!every) return;
  const loaded = Date.now();
  const ago = document.querySelector('time[data-ago]');
  const units = [['day', 86400], ['hour', 3600], ['minute', 60], ['second', 1]];
  const words = (seconds) => {
    const [unit, size] = units.find(([, size]) => seconds >= size) || units[3];
    const count = Math.floor(seconds / size);
    return count + ' ' + unit + (count === 1 ? '' : 's');
  };
  const tick = () => {
    const now = Date.now();
    const age = ago ? Math.max(0, (now - Date.parse(ago.dateTime)) / 1000) : 0;
    if (ago) ago.textContent = words(age) + ' ago';
    const state = byId('state');
    const quiet = age > Number(root.dataset.quiet);
    state.classList.toggle('quiet', quiet);
    state.textContent = quiet ? 'No news for ' + words(age) : 'Running';
    const busy = document.hidden || (viewer && viewer.open) || String(getSelection()) !== '' || now - lastRead < 5000;
    if (live.checked && !busy && now - loaded > every * 1000) { keep(); location.reload(); }
  };
  tick();
  setInterval(tick, 1000);
})();
`;
