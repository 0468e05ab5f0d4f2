import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { type Browser, chromium, type Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { StepEvent, TrainEvent } from '../../src/training/log.ts';
import { type ReportOptions, reportHtml, shownPictures } from '../../src/training/report.ts';
import { columnsOf } from '../../src/training/report-chart.ts';
import {
  formatDuration,
  formatMarks,
  formatShort,
  formatValue,
  logTicks,
  smoother,
  ticks,
} from '../../src/training/report-numbers.ts';
import { browserNote, browserPath } from '../support/browser.ts';

const PICTURE = 'data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=';
const at = (seconds: number) => new Date(Date.UTC(2026, 0, 2) + 1000 * seconds).toISOString();
const start: TrainEvent = {
  type: 'start',
  time: at(0),
  name: 'emoji',
  stages: [
    { name: 'vae', steps: 100 },
    { name: 'base', steps: 400 },
    { name: 'tune', steps: 50 },
  ],
  settings: {
    seed: 7,
    stages: [
      { name: 'vae', learningRate: { peak: 0.0001 } },
      { name: 'base', batch: 4 },
    ],
  },
  data: '3 pictures\n1 without caption',
};
const stepEvent = (stage: number, step: number, more: Partial<StepEvent> = {}): StepEvent => {
  const time = at(stage * 1000 + 3 * step);
  return { type: 'step', time, stage, step, loss: 1 / step, norm: 1, learningRate: 1e-4, seconds: 2, ...more };
};
const steps = (stage: number, count: number) => Array.from({ length: count }, (_, i) => stepEvent(stage, i + 1));
const samples = (stage: number, step: number, prompts: string[], file = 'samples/a.png'): TrainEvent => {
  const pictures = prompts.map((prompt, seed) => ({ prompt, seed, file, width: 8, height: 8 }));
  return { type: 'samples', stage, step, pictures };
};
const report = (events: readonly TrainEvent[], options: Partial<ReportOptions> = {}) =>
  reportHtml(events, { pictures: () => PICTURE, running: true, now: new Date(0), ...options });

/** The text of a page's elements, one a line. */
const textOf = (html: string) =>
  html
    .replace(/<(style|script)[\s\S]*?<\/\1>/g, '')
    .replace(/<[^>]*>/g, '\n')
    .replace(/\s*\n\s*/g, '\n');

describe('the report of a run', () => {
  const events = [start, ...steps(0, 100), ...steps(1, 101)];

  it('tells where the run is and how long its stage will take, pauses between steps included', () => {
    const text = textOf(report(events));
    // 2 s a step, but 3 s from one to the next; 299 steps are left.
    expect(text).toMatch(/Running\n/);
    expect(text).toMatch(/Speed\n2\n ?s\/step/);
    expect(text).toMatch(/Time left\n14 min\nthen 1 more stage/);
    expect(text).toMatch(/vae\n100\n ?\/ 100\ntook 4 min 59 s/);
    expect(text).toMatch(/base\n101\n ?\/ 400\n14 min left/);
    expect(text).toMatch(/tune\n0\n ?\/ 50\nto come/);
    expect(report(events)).toContain('<title>36 % · emoji</title>');
  });

  it('does not count the time in which nothing ran', () => {
    const resumed = { ...start, time: at(90_000), resumedFrom: 200 };
    const later = [102, 103].map((step) => stepEvent(1, step, { time: at(90_000 + 5 * step) }));
    expect(textOf(report([...events, resumed, ...later]))).toMatch(/base\n103\n ?\/ 400\n24 min left/);
  });

  it.each([
    [{ reason: 'finished' }, 'Finished'],
    [{ reason: 'stopped' }, 'Stopped'],
    [{ reason: 'failed', message: 'The disk is <full>.' }, 'Failed\nThe disk is &lt;full&gt;.'],
  ] as const)('tells how it ended: %o', (end, expected) => {
    const html = report([...events, { type: 'end', time: at(9999), stage: 1, step: 101, ...end }], { running: false });
    const text = textOf(html).replace(/Started\n.*\nEnded\n.*\n/, '');
    expect(text).toContain(expected);
    expect(html).not.toContain('data-every=');
  });

  it('tells that a run which left no end was interrupted', () => {
    expect(textOf(report(events, { running: false }))).toContain('Interrupted');
  });

  it('shows settings, data, notes, checkpoints and metrics', () => {
    const text = textOf(
      report([
        start,
        stepEvent(0, 1, { metrics: { colour: 0.5 } }),
        { type: 'note', time: at(5), stage: 0, step: 1, message: 'One picture was left out.' },
        { type: 'checkpoint', stage: 0, step: 1, file: 'checkpoints/first.safetensors' },
      ]),
    );
    for (const part of [
      'stages · vae\nname\nvae\nlearningRate.peak\n1e-4',
      'General\nseed\n7',
      '3 pictures\n1 without caption',
      'One picture was left out.',
      'checkpoints/first.safetensors',
      '\ncolour\n',
    ]) {
      expect(text).toContain(part);
    }
  });

  it('is a page before anything has happened', () => {
    expect(textOf(report([]))).toContain('Training');
    expect(textOf(report([start]))).toContain('Nothing yet.');
  });

  it('survives events of stages and steps that no run has', () => {
    const odd = [
      { ...stepEvent(999, 1), step: 2 ** 52 },
      stepEvent(999, 3),
      stepEvent(0, 0, { loss: Number.NaN, norm: 0, seconds: -1 }),
    ];
    expect(report(odd)).toContain('Stage 1000');
  });

  it('lets nothing from outside become HTML', () => {
    const evil = `</script><img src=x onerror="alert(1)">'&`;
    const html = report(
      [
        {
          ...start,
          name: evil,
          stages: [
            { name: evil, steps: 3 },
            { name: `${evil}2`, steps: 3 },
          ],
          settings: { [evil]: evil, [`${evil}s`]: [{ [evil]: evil }] },
          data: evil,
        },
        stepEvent(0, 1, { metrics: { [evil]: 1 } }),
        stepEvent(1, 1),
        samples(1, 1, [evil], `javascript:${evil}`),
        samples(1, 2, ['other'], evil),
        { type: 'checkpoint', stage: 1, step: 1, file: evil },
        { type: 'note', time: evil, stage: 1, step: 1, message: evil },
        { type: 'validation', stage: 1, step: 1, losses: [{ sigma: 0.5, loss: 1 }], mean: 1 },
        { type: 'end', time: evil, stage: 1, step: 1, reason: 'failed', message: evil },
      ],
      { running: false, pictures: (file) => (file === evil ? undefined : `${PICTURE}${evil}`) },
    );
    expect(html).not.toContain('<img src=x');
    expect(html).not.toContain('</script><img');
    expect(html).not.toMatch(/(href|data-file)="javascript/);
    expect(html.match(/<script/g)).toHaveLength(html.match(/<\/script>/g)!.length);
    expect(
      html.match(/&lt;\/script&gt;&lt;img src=x onerror=&quot;alert\(1\)&quot;&gt;&#39;&amp;/g)!.length,
    ).toBeGreaterThan(10);
  });

  it('asks nothing of the network', () => {
    const html = report([...events, samples(1, 100, ['a'])]);
    expect(html).toContain("default-src 'none'");
    expect(html).not.toMatch(/(src|href)="(https?:|\/\/)|@import|url\(/);
  });

  it('is small and quickly made of 100,000 steps', () => {
    const stages = [0, 1, 2].map((stage) => ({ name: `stage${stage}`, steps: 34_000 }));
    const long = [{ ...start, stages }, ...[0, 1, 2].flatMap((stage) => steps(stage, 34_000))];
    report(events);
    const before = performance.now();
    const html = report(long);
    expect(performance.now() - before).toBeLessThan(3000);
    expect(html.length).toBeLessThan(2e6);
  });
});

describe('sample pictures', () => {
  it('are rows by prompt and seed, columns by step', () => {
    const html = report([start, samples(1, 50, ['a cat', 'a dog']), samples(1, 100, ['a cat', 'a bird'])]);
    const text = textOf(html.slice(html.indexOf('class="samples"')));
    expect(text).toMatch(/base\n50\nbase\n100\na cat\nseed 0\na bird\nseed 1\na dog\nseed 1\n/);
    expect(html.match(/<img src="data:/g)).toHaveLength(4);
  });

  it('that are missing say so', () => {
    expect(report([start, samples(1, 50, ['a cat'])], { pictures: () => undefined })).toContain('picture missing');
  });

  it('are of at most 16 rounds, the first and the last among them, and those that stay do not change', () => {
    const rounds = Array.from({ length: 100 }, (_, i) => samples(1, i, ['p'], `${i}.png`));
    let before: string[] = [];
    for (let count = 1; count <= 100; count++) {
      const shown = shownPictures(rounds.slice(0, count));
      expect(shown.length).toBeLessThanOrEqual(16);
      expect([shown[0], shown.at(-1)]).toEqual(['0.png', `${count - 1}.png`]);
      expect(shown.slice(0, -1).every((file) => before.includes(file))).toBe(true);
      before = shown;
    }
  });
});

describe('columns of a chart', () => {
  const stages = [
    { stage: 0, name: 'a', offset: 0, steps: 6 },
    { stage: 1, name: 'b', offset: 6, steps: 4 },
  ];

  it('hold least, greatest and mean of their steps, and the last of the smoothed ones', () => {
    const track = { stage: 0, steps: [0, 1, 2, 3], values: [5, 1, 3, 9], smoothed: [5, 4, 3, 6] };
    expect(columnsOf([track], { stages }, 5)).toEqual([
      { stage: 0, first: 0, last: 1, at: 0.5, min: 1, max: 5, mean: 3, line: 4 },
      { stage: 0, first: 2, last: 3, at: 2.5, min: 3, max: 9, mean: 6, line: 6 },
    ]);
  });

  it('do not mix stages, and leave out what is not finite', () => {
    const tracks = [
      { stage: 0, steps: [5], values: [1] },
      { stage: 1, steps: [0, 1], values: [2, Number.NaN] },
      { stage: 7, steps: [1], values: [1] },
    ];
    expect(columnsOf(tracks, { stages }, 1).map(({ stage, at, mean }) => [stage, at, mean])).toEqual([
      [0, 5, 1],
      [1, 6, 2],
    ]);
  });
});

describe('numbers', () => {
  it('are smoothed without a bias towards 0', () => {
    // Sums of 0.75^k x over sums of 0.75^k: 4, 3 / 1.75, 2.25 / 2.3125, 9.6875 / 2.734375.
    const next = smoother(4);
    const smoothed = [4, 0, 0, 8].map(next);
    for (const [i, expected] of [4, 1.7142857142857142, 0.972972972972973, 3.5428571428571427].entries()) {
      expect(smoothed[i]).toBeCloseTo(expected, 12);
    }
    expect(next(Number.NaN)).toBe(smoothed[3]);
    expect(smoother(4)(Number.NaN)).toBeNaN();
  });

  it('are written for people', () => {
    expect([0.5, 0.00012, 1e-4, 123_456, Number.NaN, 0].map(formatValue)).toEqual([
      '0.5000',
      '1.2e-4',
      '1e-4',
      '1.23e5',
      '–',
      '0.000',
    ]);
    expect([0.5, 1e-4, 128, 0].map(formatShort)).toEqual(['0.5', '1e-4', '128', '0']);
    expect(formatMarks([0, 5e-4, 1e-3])).toEqual(['0', '5e-4', '1e-3']);
    expect([0, 45, 61, 3599, 11_520, 100_000, 1e6, Number.NaN].map(formatDuration)).toEqual([
      '0 s',
      '45 s',
      '1 min 1 s',
      '59 min',
      '3 h 12 min',
      '1 d 3 h',
      '11 d',
      '–',
    ]);
  });

  it('have round marks', () => {
    expect(ticks(0, 1, 5)).toEqual([0, 0.2, 0.4, 0.6, 0.8, 1]);
    expect(ticks(-1.2e-5, 3e-5, 4)).toEqual([-1e-5, 0, 1e-5, 2e-5, 3e-5]);
    expect([ticks(1, 1, 5), ticks(0, Number.POSITIVE_INFINITY, 5)]).toEqual([[], []]);
    expect(logTicks(0.08, 2.5, 4)).toEqual([0.1, 0.2, 0.5, 1, 2]);
    expect(logTicks(1e-6, 1e6, 4)).toEqual([1e-6, 1e-3, 1, 1e3, 1e6]);
    expect(logTicks(0.3, 0.42, 4)).toEqual(ticks(0.3, 0.42, 4));
  });
});

describe.skipIf(!browserPath)(`the page${browserNote}`, () => {
  let browser: Browser;
  let folder: string;
  beforeAll(async () => {
    const args = ['--headless', '--no-sandbox', '--disable-gpu'];
    browser = await chromium.launch({ executablePath: browserPath!, args });
    folder = await mkdtemp(join(tmpdir(), 'mmditx-report-'));
  });
  afterAll(async () => {
    await browser?.close();
    await rm(folder, { recursive: true, force: true });
  });

  const events = [
    start,
    ...steps(0, 100),
    ...steps(1, 120),
    samples(1, 50, ['a cat', 'a dog']),
    samples(1, 100, ['a cat', 'a dog']),
  ];

  /** Opens a report as a file, as people do, and gives what went wrong in it. */
  async function openReport(html: string, width = 1280): Promise<{ page: Page; file: string; faults: string[] }> {
    const file = join(folder, `report-${Math.random()}.html`);
    await writeFile(file, html);
    const page = await browser.newPage({ viewport: { width, height: 800 } });
    const faults: string[] = [];
    page.on('pageerror', (error) => faults.push(String(error)));
    page.on('console', (message) => message.type() === 'error' && faults.push(message.text()));
    page.on('request', (request) => /^(file|data):/.test(request.url()) || faults.push(request.url()));
    await page.goto(pathToFileURL(file).href);
    return { page, file, faults };
  }

  it('reads values out, switches stage and scale, and enlarges pictures', async () => {
    const { page, faults } = await openReport(report(events));
    const area = page.locator('#chart-loss .area:visible');
    const box = (await area.boundingBox())!;
    await area.hover({ position: { x: box.width - 1, y: 50 } });
    expect(await area.locator('.tip').textContent()).toMatch(/^base · step 120Smoothed.*Mean0\.008333/);
    await area.press('Home');
    expect(await area.locator('.tip').textContent()).toMatch(/^vae · step 1Smoothed/);

    const drawn = () => page.locator('#chart-loss .plot:visible .line').getAttribute('d');
    const seen = [await drawn()];
    await page.getByText('Log scale').click();
    seen.push(await drawn());
    await page.locator('.controls').getByText('base', { exact: true }).click();
    seen.push(await drawn());
    expect(new Set(seen).size).toBe(3);

    await page.getByRole('button', { name: 'Enlarge: a cat, base, step 100' }).click();
    const viewer = page.getByRole('dialog');
    expect(await viewer.locator('#viewer-text').textContent()).toBe('base, step 100 · a cat');
    await page.keyboard.press('ArrowLeft');
    await page.keyboard.press('ArrowDown');
    expect(await viewer.locator('#viewer-text').textContent()).toBe('base, step 50 · a dog');
    expect(await viewer.getByRole('link').getAttribute('href')).toBe('./samples/a.png');
    await page.keyboard.press('Escape');
    expect(await viewer.isVisible()).toBe(false);
    expect(faults).toEqual([]);
    await page.close();
  });

  it('renews itself while the run goes on and keeps what was chosen', async () => {
    const { page, file, faults } = await openReport(report(events, { everySeconds: 1 }));
    await page.getByText('Log scale').click();
    await page.locator('#settings summary').click();
    await page.evaluate('scrollTo(0, 700)');
    await writeFile(file, report(events, { everySeconds: 1, title: 'The next' }));
    await page.getByRole('heading', { name: 'The next' }).waitFor({ timeout: 10_000 });
    expect(await page.locator('#log').isChecked()).toBe(true);
    expect(await page.locator('#chart-loss .plot:visible').getAttribute('data-scale')).toBe('log');
    expect(await page.locator('#settings').getAttribute('open')).toBe('');
    expect(await page.evaluate('scrollY')).toBe(700);
    // These events are old, and nothing came since.
    expect(await page.locator('#state').textContent()).toMatch(/^No news for/);
    await page.locator('#live').uncheck();
    await writeFile(file, report(events, { everySeconds: 1, title: 'Not seen' }));
    await page.waitForTimeout(2000);
    expect(await page.getByRole('heading', { name: 'Not seen' }).count()).toBe(0);
    expect(faults).toEqual([]);
    await page.close();
  });

  it('fits on a phone, whatever the names', async () => {
    const long = 'w'.repeat(300);
    const stages = [long, `${long}2`].map((name) => ({ name, steps: 100 }));
    const named = [
      { ...start, name: long, stages, data: long, settings: { [long]: long } },
      ...steps(0, 9),
      ...steps(1, 9),
    ];
    const { page } = await openReport(report([...named, samples(1, 9, [long])]), 390);
    expect(await page.evaluate('document.documentElement.scrollWidth')).toBeLessThanOrEqual(390);
    await page.close();
  });
});
