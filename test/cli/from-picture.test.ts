import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { encodePng } from '../../src/image/png.ts';
import { settingsFromPng } from '../../src/image/settings.ts';
import { SMALL_MODEL } from '../../src/index.node.ts';
import { type CliResult, mmditx } from '../support/cli.ts';
import { writeTinyModel } from '../support/tiny-model.ts';

let folder: string;
let model: string;
const at = (name: string) => join(folder, name);
const generate = (...argv: string[]): Promise<CliResult> =>
  mmditx(['generate', '--device', 'cpu', '--steps', '2', ...argv]);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-from-'));
  model = at('tiny.safetensors');
  await writeTinyModel(model);
  const fill = (width: number, height: number, background: string) =>
    sharp({ create: { width, height, channels: 3, background } });
  await fill(70, 50, '#4080c0').jpeg().toFile(at('photo.jpg'));
  await fill(70, 50, '#c08040').jpeg().toFile(at('other.jpg'));
  const half = await fill(35, 50, '#fff').png().toBuffer();
  await fill(70, 50, '#000')
    .composite([{ input: half, left: 0, top: 0 }])
    .png()
    .toFile(at('mask.png'));
  const inputs = ['--init-image', at('photo.jpg'), '--mask', at('mask.png'), '--strength', '0.9'];
  const made = await generate('a fox', '--model', model, '--seed', '3', ...inputs, '--output', at('painted.png'));
  expect(made.code).toBe(0);
  expect((await generate('a fox', '--model', model, '--slg', '1', '--output', at('plain.png'))).code).toBe(0);
});
afterAll(() => rm(folder, { recursive: true }));

async function settingsOf(name: string) {
  const picture = settingsFromPng(await readFile(at(name)));
  if (picture?.source !== 'mmditx') throw new Error(`${name} has no settings`);
  return picture.settings;
}

describe('--from', () => {
  it('repeats a repainted picture byte by byte from the same files', async () => {
    const { code, stderr } = await mmditx([
      ...['generate', '--from', at('painted.png'), '--model', model, '--output', at('again.png')],
      ...['--init-image', at('photo.jpg'), '--mask', at('mask.png')],
    ]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(await readFile(at('again.png'))).toEqual(await readFile(at('painted.png')));
  });

  it('names the model by its file, without the folders of whoever made the picture', async () => {
    expect((await settingsOf('painted.png')).model.name).toBe('tiny.safetensors');
  });

  it.each([
    ['the picture it was drawn from', [], /with --init-image; give the same file/],
    ['the mask', ['--init-image', 'photo.jpg'], /with --mask; give the same file/],
    ['the same picture', ['--init-image', 'other.jpg', '--mask', 'mask.png'], /--init-image is not the one/],
    ['the same mask', ['--init-image', 'photo.jpg', '--mask', 'other.jpg'], /--mask is not the one/],
  ])('needs %s again', async (_name, inputs, message) => {
    const files = inputs.map((word) => (word.startsWith('--') ? word : at(word)));
    const from = ['--from', at('painted.png'), '--model', model, '--output', at('no.png')];
    const { code, stderr } = await generate(...from, ...files);
    expect(code).toBe(1);
    expect(stderr).toMatch(message);
    expect(stderr.trim().split('\n')).toHaveLength(1);
  });

  it('warns when it is given another model', async () => {
    const other = at('other.safetensors');
    await writeTinyModel(other, { side: 48 });
    const from = ['--from', at('plain.png'), '--output', at('different.png')];
    const { code, stderr } = await generate(...from, '--model', other);
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr:
        'Warning: plain.png was made with tiny.safetensors, not with other.safetensors; the new picture will differ.\n',
    });
  });

  it.skipIf(!existsSync(SMALL_MODEL))('refuses when the model it was made with is not given', async () => {
    const { code, stderr } = await generate('--from', at('plain.png'), '--output', at('no.png'));
    expect({ code, stderr }).toEqual({
      code: 1,
      stderr: expect.stringMatching(/^mmditx: plain\.png was made with tiny\.safetensors.*--model\.\n$/),
    });
  });

  it('switches skip-layer guidance off on demand', async () => {
    const from = ['--from', at('plain.png'), '--model', model];
    await generate(...from, '--output', at('kept.png'));
    expect((await settingsOf('kept.png')).skipLayerGuidance).toMatchObject({ layers: [1] });
    await generate(...from, '--slg-scale', '1', '--output', at('weaker.png'));
    expect((await settingsOf('weaker.png')).skipLayerGuidance).toMatchObject({ layers: [1], scale: 1 });
    await generate(...from, '--no-slg', '--output', at('off.png'));
    expect((await settingsOf('off.png')).skipLayerGuidance).toBeNull();
  });

  it('takes what it understands from a picture of another program, and says so', async () => {
    const text = new Map([
      ['parameters', 'a dog\nNegative prompt: cat\nSteps: 3, Sampler: Euler, CFG scale: 2, Seed: 8, Size: 48x32'],
    ]);
    await writeFile(at('a1111.png'), encodePng({ width: 1, height: 1, data: new Uint8Array(3) }, { text }));
    const argv = [
      'generate',
      '--device',
      'cpu',
      '--from',
      at('a1111.png'),
      '--model',
      model,
      '--output',
      at('dog.png'),
    ];
    expect((await mmditx(argv)).stderr).toMatch(/^Warning: .*another program/);
    const expected = { prompt: 'a dog', negativePrompt: 'cat', steps: 3, sampler: 'euler', cfg: 2, seed: 8, width: 48 };
    expect(await settingsOf('dog.png')).toMatchObject(expected);
  });

  it('refuses a picture without settings, and a file that is no picture', async () => {
    await writeFile(at('bare.png'), encodePng({ width: 1, height: 1, data: new Uint8Array(3) }));
    const bare = await generate('--from', at('bare.png'), '--model', model);
    expect(bare).toMatchObject({ code: 1, stderr: expect.stringMatching(/^mmditx: There are no settings in .*\n$/) });
    const photo = await generate('--from', at('photo.jpg'), '--model', model);
    expect(photo).toMatchObject({ code: 1, stderr: expect.stringMatching(/^mmditx: .*PNG.*\n$/) });
    const missing = await generate('--from', at('nowhere.png'), '--model', model);
    expect(missing).toMatchObject({ code: 1, stderr: expect.stringMatching(/^mmditx: Cannot read .*nowhere.*\n$/) });
  });
});
