import { appendFile, mkdir, mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import sharp from 'sharp';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { openTrainLog, readTrainLog, type TrainLog, trainReporter } from '../../src/training/log.node.ts';
import type { RunPosition, TrainEvent } from '../../src/training/log.ts';

let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'mmditx-log-'));
});
afterAll(() => rm(root, { recursive: true, force: true }));

const newFolder = () => mkdtemp(join(root, 'run-'));
const now = () => new Date().toISOString();
const startEvent = (resumedFrom?: number): TrainEvent => {
  const stages = [
    { name: 'one', steps: 4 },
    { name: 'two', steps: 6 },
  ];
  return { type: 'start', time: now(), name: 'run', stages, settings: {}, ...(resumedFrom && { resumedFrom }) };
};
const stepEvent = (stage: number, step: number): TrainEvent => {
  const loss = 1 / (1 + stage + step);
  return { type: 'step', time: now(), stage, step, loss, norm: 1, learningRate: 0.1, seconds: Math.random() };
};

/** What happens at a position, in the order of the trainer. */
function eventsAt({ stage, step }: RunPosition): TrainEvent[] {
  const events: TrainEvent[] = [];
  if (step > 0) events.push(stepEvent(stage, step));
  if (step % 2 === 0) {
    events.push(
      { type: 'note', time: now(), stage, step, message: 'a picture with a \u2028 in its name' },
      { type: 'validation', stage, step, losses: [{ sigma: 0.5, loss: 1 / step }], mean: 1 / step },
      { type: 'samples', stage, step, pictures: [{ prompt: 'p', seed: 0, file: 's.png', width: 8, height: 8 }] },
      { type: 'checkpoint', stage, step, file: `stage-${stage}-step-${step}` },
    );
  }
  return events;
}

const positions: RunPosition[] = [];
for (const [stage, steps] of [4, 6].entries()) {
  for (let step = 0; step <= steps; step++) positions.push({ stage, step });
}

/** Goes through a run from a position, for some positions, and does what is due there once more. */
async function goOn(path: string, from: RunPosition, count: number): Promise<void> {
  const log = await openTrainLog(path, { at: from });
  const first = positions.findIndex(({ stage, step }) => stage === from.stage && step === from.step);
  await log.append(startEvent(first));
  for (const position of positions.slice(first, first + count)) {
    for (const event of eventsAt(position)) await log.append(event);
  }
  await log.close();
}

/** The lines without what may differ between a run that was killed and one that was not. */
async function lasting(path: string) {
  const events = await readTrainLog(path);
  return events
    .filter(({ type }) => type !== 'start' && type !== 'end')
    .map((event) => JSON.stringify({ ...event, time: '', seconds: 0 }));
}

describe('the log of a run', () => {
  it('reads after five kills as if there had been none', async () => {
    const [whole, killed] = [join(await newFolder(), 'log.jsonl'), join(await newFolder(), 'log.jsonl')];
    await goOn(whole, positions[0]!, 100);
    for (const [from, count] of [
      [0, 2],
      [0, 6],
      [4, 3],
      [2, 5],
      [5, 4],
    ] as const) {
      await goOn(killed, positions[from]!, count);
      // A crash in the middle of a line.
      await appendFile(killed, JSON.stringify(stepEvent(1, 5)).slice(0, 50));
    }
    await goOn(killed, positions[8]!, 100);
    expect(await lasting(killed)).toEqual(await lasting(whole));
    const starts = (await readTrainLog(killed)).filter(({ type }) => type === 'start');
    expect(starts).toHaveLength(6);
    expect(
      (await readFile(killed, 'utf8'))
        .split('\n')
        .slice(0, -1)
        .every((line) => JSON.parse(line)),
    ).toBe(true);
  });

  it('leaves a file as it is when nothing comes after the position', async () => {
    const path = join(await newFolder(), 'log.jsonl');
    const text = eventsAt({ stage: 0, step: 2 })
      .map((event) => `${JSON.stringify(event)} \n`)
      .join('');
    await writeFile(path, text);
    const log = await openTrainLog(path, { at: { stage: 0, step: 2 } });
    expect(log.events).toHaveLength(5);
    await log.close();
    expect(await readFile(path, 'utf8')).toBe(text);
  });

  it('begins anew at the beginning of a run, but keeps starts', async () => {
    const path = join(await newFolder(), 'log.jsonl');
    await goOn(path, positions[0]!, 3);
    const log = await openTrainLog(path);
    expect(log.events.map(({ type }) => type)).toEqual(['start']);
    await log.close();
    expect(await readTrainLog(path)).toHaveLength(1);
  });

  it('is torn nowhere but in its last line, whatever is appended at once', async () => {
    const path = join(await newFolder(), 'log.jsonl');
    const log = await openTrainLog(path);
    const heard: TrainEvent[] = [];
    const end = log.onAppend((event) => heard.push(event));
    const events = Array.from({ length: 200 }, (_, i) => stepEvent(0, i + 1));
    await Promise.all(events.map((event) => log.append(event)));
    end();
    await log.append(stepEvent(1, 1));
    await log.flush();
    expect(await readTrainLog(path)).toEqual([...events, log.events.at(-1)]);
    expect(heard).toEqual(events);
    await log.close();
  });

  it('refuses to be opened in a folder that is not there', async () => {
    const path = join(await newFolder(), 'absent', 'log.jsonl');
    await expect(openTrainLog(path)).rejects.toMatchObject({ code: 'io', message: expect.stringContaining(path) });
    await expect(readTrainLog(path)).rejects.toMatchObject({ code: 'io' });
  });
});

/** A log on a disk with room for so many bytes more; a write that does not fit is done in part, as by a real one. */
async function onSmallDisk(room: number, maxWaiting?: number) {
  const path = join(await newFolder(), 'log.jsonl');
  const problems: string[] = [];
  const onProblem = (message: string) => problems.push(message);
  const log = await openTrainLog(path, { onProblem, ...(maxWaiting && { maxWaiting }) });
  const probe = await open(path);
  const prototype = Object.getPrototypeOf(probe);
  await probe.close();
  const { write } = prototype;
  vi.spyOn(prototype, 'write').mockImplementation(async function (this: unknown, ...parameters: unknown[]) {
    const bytes = parameters[0] as Uint8Array;
    const fitting = bytes.subarray(0, room);
    if (fitting.length === 0) throw Object.assign(new Error('no space'), { code: 'ENOSPC' });
    room -= fitting.length;
    return write.call(this, fitting);
  });
  return { path, log, problems, free: (bytes: number) => (room = bytes) };
}

describe('the log on a full disk', () => {
  afterEach(() => {
    vi.restoreAllMocks();
  });

  it('goes on, says so once, and is complete when there is space again', async () => {
    const { path, log, problems, free } = await onSmallDisk(300);
    const events = Array.from({ length: 20 }, (_, i) => stepEvent(0, i + 1));
    for (const event of events.slice(0, 10)) await log.append(event);
    expect(problems).toEqual([expect.stringMatching(/log\.jsonl: the disk is full.*Training goes on/)]);
    expect(log.events).toEqual(events.slice(0, 10));
    expect((await readTrainLog(path)).length).toBeLessThan(3);
    free(1e9);
    for (const event of events.slice(10)) await log.append(event);
    expect(await readTrainLog(path)).toEqual(events);
    expect((await readFile(path, 'utf8')).split('\n')).toHaveLength(21);
    expect(problems).toHaveLength(1);
    free(0);
    await log.append(stepEvent(0, 21));
    expect(problems).toHaveLength(2);
    await log.close();
  });

  it('says what is lost when it never gets space', async () => {
    const { log, problems } = await onSmallDisk(0, 300);
    for (let step = 1; step <= 5; step++) await log.append(stepEvent(0, step));
    await log.close();
    expect(problems).toHaveLength(3);
    expect(problems[1]).toMatch(/will be missing/);
    expect(problems[2]).toMatch(/The last 2 lines of .* could not be written/);
  });
});

it.skipIf(process.platform === 'win32')('refuses a device as a log, which may have no end', async () => {
  await expect(openTrainLog('/dev/zero')).rejects.toMatchObject({ code: 'io' });
});

describe('the report', () => {
  const reportOf = (folder: string) => readFile(join(folder, 'report.html'), 'utf8');
  const until = async (check: () => Promise<boolean>) => {
    for (let i = 0; i < 200; i++) {
      if (await check().catch(() => false)) return;
      await wait(10);
    }
    throw new Error('It did not come to be.');
  };

  it('is there from the start, is not rewritten too often, and is final at the end', async () => {
    const folder = await newFolder();
    const log: TrainLog = await openTrainLog(join(folder, 'log.jsonl'));
    const reporter = trainReporter({ folder, log, everySeconds: 1000, title: 'Emoji & more' });
    await log.append(startEvent());
    await until(async () => (await reportOf(folder)).includes('Running'));
    const first = await reportOf(folder);
    expect(first).toContain('<h1>Emoji &amp; more</h1>');
    await log.append(stepEvent(0, 1));
    await wait(50);
    expect(await reportOf(folder)).toBe(first);
    await log.append({ type: 'end', time: now(), stage: 0, step: 1, reason: 'stopped' });
    await reporter.close();
    await log.close();
    const last = await reportOf(folder);
    expect(last).toContain('>Stopped<');
    expect(last).not.toContain('data-every');
    expect((await readdir(folder)).sort()).toEqual(['log.jsonl', 'report.html']);
  });

  it('holds small copies of the sample pictures, and of no picture outside the folder', async () => {
    const folder = await newFolder();
    await mkdir(join(folder, 'samples'));
    const picture = sharp({ create: { width: 1024, height: 512, channels: 3, background: '#c04020' } }).png();
    await picture.toFile(join(folder, 'samples', 'a.png'));
    await picture.toFile(join(root, 'outside.png'));
    await writeFile(join(folder, 'samples', 'torn.png'), 'no picture');
    const log = await openTrainLog(join(folder, 'log.jsonl'));
    const reporter = trainReporter({ folder, log });
    const files = [
      'samples/a.png',
      'samples/torn.png',
      'samples/gone.png',
      '../outside.png',
      join(root, 'outside.png'),
    ];
    const pictures = files.map((file, seed) => ({ prompt: 'p', seed, file, width: 1024, height: 512 }));
    await log.append({ type: 'samples', stage: 0, step: 1, pictures });
    await reporter.close();
    await log.close();
    const urls = [...(await reportOf(folder)).matchAll(/src="data:image\/webp;base64,([^"]+)"/g)];
    expect(urls).toHaveLength(1);
    const { width, height, format } = await sharp(Buffer.from(urls[0]![1]!, 'base64')).metadata();
    expect({ width, height, format }).toEqual({ width: 512, height: 256, format: 'webp' });
  });

  it('does not stop training when it cannot be written', async () => {
    const folder = await newFolder();
    const log = await openTrainLog(join(folder, 'log.jsonl'));
    await mkdir(join(folder, 'report.html'));
    const problems: string[] = [];
    const reporter = trainReporter({ folder, log, everySeconds: 0, onProblem: (text) => problems.push(text) });
    for (let step = 1; step <= 5; step++) {
      await log.append(stepEvent(0, step));
      await wait(5);
    }
    await reporter.close();
    await log.close();
    expect(problems).toEqual([expect.stringMatching(/^The report could not be written; training goes on\..*folder/)]);
  });
});
