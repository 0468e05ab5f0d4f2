import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { settingsFromPng } from '../../src/image/settings.ts';
import { mmditx } from '../support/cli.ts';
import { writeTinyModel } from '../support/tiny-model.ts';

let folder: string;
let model: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-convert-'));
  model = join(folder, 'tiny.safetensors');
  await writeTinyModel(model);
});
afterAll(() => rm(folder, { recursive: true }));

const bytes = async (path: string) => (await stat(path)).size;
const pixels = (path: string) => sharp(path).raw().toBuffer();

async function draw(source: string, name: string, ...argv: string[]): Promise<Buffer> {
  const output = join(folder, `${name}.png`);
  const options = ['--device', 'cpu', '--steps', '2', '--seed', '1', '--overwrite', '--cache', join(folder, 'cache')];
  const result = await mmditx(['generate', 'a red fox', '--model', source, ...options, '--output', output, ...argv]);
  expect(result).toMatchObject({ code: 0, stdout: `${output}\n` });
  return pixels(output);
}

/** Mean difference of two pictures, of 255. */
function difference(a: Buffer, b: Buffer): number {
  expect(a.length).toBe(b.length);
  return a.reduce((sum, value, i) => sum + Math.abs(value - b[i]!), 0) / a.length;
}

describe('convert', () => {
  it.each([
    ['int8', 0.5],
    ['int4', 0.4],
  ] as const)('writes a model in %s that draws about the same picture', async (precision, share) => {
    const output = join(folder, 'new', `${precision}.safetensors`);
    const result = await mmditx(['convert', model, '--precision', precision, '--output', output]);
    expect(result).toMatchObject({ code: 0, stdout: `${output}\n` });
    expect(await bytes(output)).toBeLessThan(share * (await bytes(model)) + 3e6);
    const [exact, own] = [await draw(model, 'fp32'), await draw(output, `own-${precision}`)];
    expect(difference(own, exact)).toBeLessThan(precision === 'int8' ? 4 : 40);
    expect(own).not.toEqual(exact);
    // What generate does by itself.
    expect(await draw(model, `cached-${precision}`, '--precision', precision)).toEqual(
      await draw(output, `again-${precision}`, '--precision', precision),
    );
  });

  it('writes int8 where nothing else is asked for', async () => {
    const output = join(folder, 'default.safetensors');
    expect((await mmditx(['convert', model, '-o', output])).code).toBe(0);
    await mmditx(['convert', model, '-o', join(folder, 'int8.safetensors'), '--precision', 'int8']);
    expect(Buffer.compare(await readFile(output), await readFile(join(folder, 'int8.safetensors')))).toBe(0);
  });

  it('writes what generate can name in its settings', async () => {
    const output = join(folder, 'named.safetensors');
    await mmditx(['convert', model, '-o', output]);
    await draw(output, 'named', '--precision', 'int8');
    const found = settingsFromPng(await readFile(join(folder, 'named.png')));
    expect(found).toMatchObject({ settings: { precision: 'int8', model: { name: 'named.safetensors' } } });
  });

  it('says what is not in the file, unless it is to be quiet', async () => {
    const part = resolve('test/fixtures/layouts/scaled-older.safetensors');
    const output = join(folder, 't5.safetensors');
    const { code, stderr } = await mmditx(['convert', part, '-o', output]);
    expect(code).toBe(0);
    expect(stderr).toContain('Not in it: transformer, VAE, CLIP-L text encoder, CLIP-G text encoder.');
    expect((await mmditx(['convert', part, '-o', output, '--quiet'])).stderr).toBe('');
  });

  it('tells its progress on a terminal', async () => {
    const { stderr } = await mmditx(['convert', model, '-o', join(folder, 'shown.safetensors')], undefined, {
      isTTY: true,
    });
    expect(stderr).toMatch(/Converting to int8: \d+ %.*Converting to int8: 100 %\n$/s);
  });

  it('stops where it is told to and leaves nothing', async () => {
    const stop = new AbortController();
    stop.abort();
    const result = await mmditx(['convert', model, '-o', join(folder, 'stopped.safetensors')], stop.signal);
    expect(result).toMatchObject({ code: 130, stdout: '' });
    expect((await readdir(folder)).filter((name) => name.includes('stopped'))).toEqual([]);
  });
});

describe('convert refuses', () => {
  it.each([
    ['no output', () => ['convert', model], 2, /option '-o, --output <file>' not specified/],
    ['fp32', () => ['convert', model, '-o', 'x', '--precision', 'fp32'], 2, /fp16, int8, int4/],
    ['a file that is not there', () => ['convert', join(folder, 'no'), '-o', join(folder, 'x')], 1, /no such file/],
    ['to replace the model', () => ['convert', model, '-o', model], 1, /is a file of the model; choose another output/],
    ['a folder as output', () => ['convert', model, '-o', folder], 1, /it is a folder/],
  ])('%s', async (_, argv, code, message) => {
    const result = await mmditx(argv());
    expect(result.code).toBe(code);
    expect(result.stderr).toMatch(message);
  });
});
