import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { load, readLora } from '../../src/index.node.ts';
import { readTrainLog } from '../../src/training/log.node.ts';
import type { StepEvent, TrainEvent } from '../../src/training/log.ts';
import { train } from '../../src/training/train.node.ts';
import { cpu } from '../support/run.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-train-'));
  const pictures = join(folder, 'pictures');
  await mkdir(pictures);
  for (const [i, colour] of ['red', 'green', 'blue', 'yellow', 'black', 'white', 'orange', 'purple'].entries()) {
    const size = { width: 40 + 8 * (i % 2), height: 40 };
    await sharp({ create: { ...size, channels: 3, background: colour } })
      .png()
      .toFile(join(pictures, `${colour}.png`));
    await writeFile(join(pictures, `${colour}.txt`), `a ${colour} square\n${colour}`);
  }
  await writeFile(join(pictures, 'broken.png'), 'not a picture');
  // Its header is sound: only decoding tells.
  const noise = {
    width: 64,
    height: 64,
    channels: 3 as const,
    noise: { type: 'gaussian' as const, mean: 128, sigma: 50 },
  };
  const whole = await sharp({ create: { ...noise, background: 'grey' } })
    .png()
    .toBuffer();
  await writeFile(join(pictures, 'torn.png'), whole.subarray(0, whole.length / 2));
});
afterAll(() => rm(folder, { recursive: true }));

/** Everything from nothing, in networks that take milliseconds. */
const SCRATCH = `
networks:
  transformer: { hiddenSize: 32, depth: 2, heads: 2, tableSize: 8, dualAttentionLayers: [0], positions: { grid: 2, span: 2 } }
  vae: { channels: 8, multipliers: [1, 1, 1, 1], resBlocks: 1, groups: 4 }
  clipL: { width: 16, layers: 2, heads: 2, positions: 12 }
  clipG: { width: 16, layers: 2, heads: 2, positions: 12 }
  t5: { layers: 1, heads: 2, headDim: 8, tokens: 12 }
data:
  all: { path: pictures, sizes: [32], flip: true, crop: random, captions: { dropRate: 0.2 } }
  wide: { path: pictures, sizes: [[48, 32], [32, 48]], assign: spread, fit: contain }
stages:
  - { name: tokenizers, train: tokenizers, clipVocabulary: 600, t5Vocabulary: 200, data: [all] }
  - { name: vae, train: autoencoder, data: [all], crop: 24, steps: 3, batch: 2, learningRate: { peak: 1e-3 }, normalize: true }
  - { name: whole, train: diffusion, textEncoders: full, data: [all], steps: 6, batch: 3, accumulate: 2,
      average: { decay: 0.9 }, learningRate: { peak: 1e-3, warmup: 2, schedule: cosine },
      text: { encoderDropout: 0.3 }, positions: { randomCrop: 0.5 } }
  - { name: mixed, train: diffusion, steps: 5, batch: 3, learningRate: { peak: 1e-3 }, checkpointing: 1,
      positions: { table: 12 }, noise: { shift: resolution, weighting: { kind: cosmap } } }
checkpoints: { every: 2 }
`;

async function configFile(name: string, text: string): Promise<string> {
  const path = join(folder, `${name}.yaml`);
  await writeFile(path, `name: ${name}\ndevice: cpu\nthreads: 1\n${text}`);
  return path;
}

/** Steps of a log: everything but the times. */
async function stepsOf(name: string): Promise<Omit<StepEvent, 'time' | 'seconds'>[]> {
  const events = await readTrainLog(join(folder, 'runs', name, 'log.jsonl'));
  return events.flatMap((event) => {
    if (event.type !== 'step') return [];
    const { time: _, seconds: __, ...rest } = event;
    return [rest];
  });
}

const MORE = `
samples: { every: 100, steps: 2, prompts: [{ prompt: a red square, size: [32, 32], seed: 1 }] }
validation: { every: 100, share: 0.3 }
export: { file: tiny.safetensors, defaults: { width: 32, height: 32, steps: 2, cfg: 2 } }
`;

describe('a run from nothing', () => {
  it('makes tokenizers, autoencoder and transformer, and a model that draws', async () => {
    const config = await configFile('scratch', SCRATCH + MORE);
    const { files, folder: run } = await train(config, { runtime: cpu });
    expect(files).toEqual([join(folder, 'tiny.safetensors')]);
    const sd = await load(files, { device: 'cpu' });
    expect(sd.defaults).toMatchObject({ width: 32, height: 32, steps: 2, cfg: 2 });
    const [image] = await sd.generate({ prompt: 'a red square', seed: 1 });
    expect(image).toMatchObject({ width: 32, height: 32 });
    // The extended table takes pictures that the first one did not.
    await sd.generate({ prompt: 'a red square', seed: 1, width: 192, height: 32, steps: 1 });
    await sd.dispose();

    const steps = await stepsOf('scratch');
    expect(steps.map(({ stage, step }) => `${stage}.${step}`)).toEqual([
      '1.1',
      '1.2',
      '1.3',
      '2.1',
      '2.2',
      '2.3',
      '2.4',
      '2.5',
      '2.6',
      '3.1',
      '3.2',
      '3.3',
      '3.4',
      '3.5',
    ]);
    const events = await readTrainLog(join(run, 'log.jsonl'));
    expect(events.filter(({ type }) => type === 'validation').length).toBeGreaterThanOrEqual(2);
    expect((await readdir(join(run, 'samples'))).sort()).toEqual(['mixed-000005-1.png', 'whole-000006-1.png']);
    expect(await readFile(join(run, 'report.html'), 'utf8')).toContain('scratch');
  }, 120_000);

  it('does nothing when it is finished, and refuses another configuration', async () => {
    const config = await configFile('scratch', SCRATCH + MORE);
    const before = await stepsOf('scratch');
    await train(config, { runtime: cpu });
    expect(await stepsOf('scratch')).toEqual(before);
    const changed = await configFile('scratch', SCRATCH.replace('steps: 6', 'steps: 7') + MORE);
    await expect(train(changed, { runtime: cpu })).rejects.toThrow(/made with another configuration/);
  }, 60_000);
});

describe('a run that is killed again and again', () => {
  it('has the losses, weights and data order of one that never was', async () => {
    const config = await configFile('killed', SCRATCH);
    const expected = await configFile('straight', SCRATCH);
    await train(expected, { runtime: cpu });
    const log = join(folder, 'runs/killed/log.jsonl');
    let kills = 0;
    for (; ; kills++) {
      // Killed at another number of steps each time, wherever it then is.
      const finished = await runUntil(config, log, kills < 5 ? 2 + kills : Number.POSITIVE_INFINITY);
      if (finished) break;
    }
    expect(kills).toBeGreaterThanOrEqual(4);
    expect(await stepsOf('killed')).toEqual(await stepsOf('straight'));
    for (const stage of ['02-vae/vae', '03-whole/transformer', '03-whole/t5', '04-mixed/transformer']) {
      const [killed, straight] = await Promise.all(
        ['killed', 'straight'].map((name) => readFile(join(folder, 'runs', name, 'stages', `${stage}.safetensors`))),
      );
      expect(killed!.equals(straight!), stage).toBe(true);
    }
  }, 240_000);
});

/** Runs the trainer in a process of its own and kills it when the log has so many more steps. @returns whether it ended */
async function runUntil(config: string, log: string, moreSteps: number): Promise<boolean> {
  const program = resolve('test/support/train-process.ts');
  const child = spawn(process.execPath, ['--import', 'tsx', program, config], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const ended = new Promise<number | null>((done) => child.on('exit', done));
  const count = async () =>
    existsSync(log) ? (await readTrainLog(log)).filter(({ type }) => type === 'step').length : 0;
  let first: number | undefined;
  const timer = setInterval(async () => {
    // Counted from where the process has gone on, not from what it then removes.
    if (first === undefined) {
      if (existsSync(log) && (await readTrainLog(log)).at(-1)?.type !== 'end') first = await count();
    } else if ((await count()) - first >= moreSteps) child.kill('SIGKILL');
  }, 20);
  const code = await ended;
  clearInterval(timer);
  return code === 0;
}

describe('a run whose pictures or settings change', () => {
  const text = (rate: string, more = '') => `
model: ${resolve('models/small/mmditx-small.safetensors')}
cache: false
data: { all: { path: own, sizes: [64] } }
validation: { every: 1, path: pictures, pictures: 3 }
stages: [{ name: whole, train: diffusion, steps: 4, batch: 2, learningRate: { peak: ${rate} }${more} }]
checkpoints: { every: 1 }
`;
  it('goes on with another learning rate, not with other captions', async () => {
    await cp(join(folder, 'pictures'), join(folder, 'own'), { recursive: true });
    const stop = new AbortController();
    const stopAtTwo = (event: TrainEvent) => {
      if (event.type === 'step' && event.step === 2) stop.abort(new Error('stopped'));
    };
    const first = train(await configFile('changing', text('1e-3')), {
      runtime: cpu,
      signal: stop.signal,
      onEvent: stopAtTwo,
    });
    await expect(first).rejects.toThrow('stopped');
    const caption = join(folder, 'own/red.txt');
    await writeFile(caption, 'another');
    const config = await configFile('changing', text('1e-4'));
    await expect(train(config, { runtime: cpu })).rejects.toThrow(/its pictures, captions or model, have changed/);
    await writeFile(caption, 'a red square\nred');
    await train(config, { runtime: cpu });
    expect((await stepsOf('changing')).map(({ step }) => step)).toEqual([1, 2, 3, 4]);
    const events = await readTrainLog(join(folder, 'runs/changing/log.jsonl'));
    const notes = events.flatMap((event) => (event.type === 'note' ? event.message : []));
    expect(notes).toContainEqual(expect.stringMatching(/settings of the optimiser have changed/));
    expect(notes).toContainEqual(expect.stringMatching(/torn\.png/));
    // The pictures of validation.path.
    expect(events.filter(({ type }) => type === 'validation')).toHaveLength(4);
  }, 60_000);
});

describe('a LoRA', () => {
  it('changes text encoders, too, and those of another folder', async () => {
    const config = await configFile(
      'encoders',
      `
model: ${resolve('models/small/mmditx-small.safetensors')}
networks: { t5: { layers: 1, heads: 3, headDim: 64, tokens: 16 } }
precision: int8
data: { all: { path: pictures, sizes: [64] } }
stages:
  - { name: both, train: diffusion, transformer: lora, textEncoders: lora, steps: 2, batch: 2, learningRate: { peak: 1e-3 },
      lora: { rank: 2, blocks: [0] } }
`,
    );
    const { files } = await train(config, { runtime: cpu });
    const { parts } = await readLora(files[0]!);
    expect(Object.keys(parts).sort()).toEqual(['clipG', 'clipL', 't5', 'transformer']);
  }, 60_000);

  it.each(['kohya', 'diffusers'])(
    'is trained on a model, goes on from its file, and loads again (%s)',
    async (format) => {
      const text = (name: string, from = '') =>
        `
model: ../../${'models/small/mmditx-small.safetensors'}
data: { all: { path: pictures, sizes: [64], buckets: { min: 32, max: 128, step: 16 } } }
stages:
  - name: ${name}
    train: diffusion
    transformer: lora
    steps: 2
    batch: 2
    learningRate: { peak: 1e-2 }
    lora: { rank: 2, dropout: 0.2, targets: [attention, mlp, modulation], blocks: [0, 5], format: ${format}${from} }
`.replace('../../models', resolve('models'));
      const first = await train(await configFile(`lora-${format}`, text('first')), { runtime: cpu });
      expect(first.files).toHaveLength(1);
      const lora = await readLora(first.files[0]!);
      expect(lora.unused).toEqual([]);
      expect(Object.keys(lora.parts)).toEqual(['transformer']);
      const from = `, from: ${first.files[0]}`;
      const second = await train(await configFile(`again-${format}`, text('second', from)), { runtime: cpu });
      const sd = await load(undefined, { device: 'cpu' });
      const draw = async (strength: number) => {
        const options = { prompt: '3d fox', width: 64, height: 64, steps: 2, seed: 1 };
        const [image] = await sd.generate({
          ...options,
          loras: [{ lora: await readLora(second.files[0]!), strength }],
        });
        return image!.data;
      };
      expect(await draw(0)).not.toEqual(await draw(1));
      await sd.dispose();
    },
    120_000,
  );
});

describe('mistakes', () => {
  it('are told when a position table is extended on another grid', async () => {
    const config = await configFile(
      'grid',
      `
model: ${resolve('models/small/mmditx-small.safetensors')}
data: { all: { path: pictures, sizes: [64] } }
stages: [{ name: wide, train: diffusion, steps: 1, learningRate: { peak: 1 }, positions: { table: 32 } }]
`,
    );
    await expect(train(config, { runtime: cpu })).rejects.toThrow(
      /made with other positions than 64 patches over 0 to 16/,
    );
  });

  it.each([
    ['networks: {}\ndata: {}\nstages: []', /data: name at least one|stages/],
    [
      'model: x\ndata: { a: { path: p, sizes: [64] } }\nstages: [{ name: s, train: diffusion, steps: 0, learningRate: { peak: 1 } }]',
      /stages\[0\]\.steps/,
    ],
    [
      'model: x\ndata: { a: { path: p, sizes: [64], colour: 1 } }\nstages: [{ name: s, train: tokenizers }]',
      /data\.a has "colour"/,
    ],
    ['data: [', /cannot be read: .*line/],
  ])('in the configuration are told with their place: %s', async (text, message) => {
    await expect(train(await configFile('wrong', text))).rejects.toThrow(message);
  });

  it('are told before any work: pictures that are not there', async () => {
    const text = SCRATCH.replaceAll('path: pictures', 'path: nowhere');
    await expect(train(await configFile('nowhere', text), { runtime: cpu })).rejects.toThrow(/nowhere/);
  });
});
