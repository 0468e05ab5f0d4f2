import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { mmditx } from '../support/cli.ts';

let folder: string;
let config: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-cli-train-'));
  await mkdir(join(folder, 'pictures'));
  for (const colour of ['red', 'green', 'blue']) {
    const picture = { width: 96, height: 64, channels: 3 as const, background: colour };
    await sharp({ create: picture })
      .jpeg()
      .toFile(join(folder, 'pictures', `${colour}.jpg`));
    await writeFile(join(folder, 'pictures', `${colour}.txt`), `a ${colour} fox${' on a fox'.repeat(9)}`);
  }
  await writeFile(join(folder, 'pictures', 'torn.png'), 'no picture');
  config = join(folder, 'lora.yaml');
  await writeFile(
    config,
    `
name: colours
model: ${resolve('models/small/mmditx-small.safetensors')}
device: cpu
threads: 1
data: { foxes: { path: pictures, sizes: [64] } }
stages:
  - { name: lora, train: diffusion, transformer: lora, steps: 2, learningRate: { peak: 1e-3 }, lora: { rank: 2, blocks: [0] } }
`,
  );
});
afterAll(() => rm(folder, { recursive: true }));

describe('mmditx dataset', () => {
  it('shows sizes, what is cropped, captions that are cut, and broken files', async () => {
    const { code, stdout } = await mmditx(['dataset', config]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/3 pictures, 3 captions/);
    expect(stdout).toMatch(/64 x 64 +3 +100\.0 % +33\.3 %/);
    expect(stdout).toMatch(/Cut for CLIP, which takes 16 tokens/);
    expect(stdout).toMatch(/torn\.png/);
  });

  it('tells a mistake in the configuration with its place', async () => {
    const wrong = join(folder, 'wrong.yaml');
    await writeFile(wrong, 'name: wrong\nmodel: x\ndata: { a: { path: b } }\nstages: []\n');
    const { code, stderr } = await mmditx(['dataset', wrong]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/wrong\.yaml is not a training configuration: .*data\.a\.sizes/);
    expect(stderr.trim().split('\n')).toHaveLength(1);
  });
});

describe('mmditx encode', () => {
  it('encodes once, for all that train afterwards', async () => {
    expect((await mmditx(['encode', config, '--quiet'])).stdout).toBe('Everything is encoded.\n');
    const { code, stdout, stderr } = await mmditx(['train', config, '--quiet']);
    expect(stderr).toBe('');
    expect(code).toBe(0);
    expect(stdout.trim()).toBe(join(folder, 'runs/colours/stages/01-lora/colours.safetensors'));
  }, 60_000);
});
