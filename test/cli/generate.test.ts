import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { VERSION } from '../../src/version.ts';
import { type CliResult, mmditx } from '../support/cli.ts';
import { writeTinyModel } from '../support/tiny-model.ts';

let folder: string;
let model: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-generate-'));
  model = join(folder, 'tiny.safetensors');
  await writeTinyModel(model);
});
afterAll(() => rm(folder, { recursive: true }));

const generate = (...argv: string[]): Promise<CliResult> =>
  mmditx(['generate', '--model', model, '--device', 'cpu', '--output', join(folder, 'unnamed.png'), ...argv]);
const pixels = (path: string) => sharp(path).raw().toBuffer();

describe('generate', () => {
  it('writes a picture and prints its path alone', async () => {
    const output = join(folder, 'new folder', 'fox.png');
    const { code, stdout } = await generate('a red fox', '--seed', '1', '--output', output);
    expect({ code, stdout }).toEqual({ code: 0, stdout: `${output}\n` });
    expect(await sharp(output).metadata()).toMatchObject({ format: 'png', width: 32, height: 32 });
  });

  it('repeats a picture pixel by pixel from itself', async () => {
    const output = join(folder, 'whole.png');
    const all = ['--seed', '5', '--negative', 'dog', '--size', '48x32', '--cfg', '4', '--sampler', 'euler_ancestral'];
    await generate(
      'a (red:1.3) fox',
      ...all,
      '--scheduler',
      'beta',
      '--shift',
      '2',
      '--slg',
      '0,1',
      '--output',
      output,
    );
    const again = join(folder, 'again.png');
    expect((await generate('--from', output, '--output', again)).code).toBe(0);
    expect(await pixels(again)).toEqual(await pixels(output));
    expect(await readFile(again)).toEqual(await readFile(output));
  });

  it('repeats one picture of a batch', async () => {
    await generate('a fox', '--seed', '2', '--batch', '3', '--output', join(folder, 'batch-{index}.png'));
    const again = join(folder, 'one.png');
    const { stdout } = await generate('--from', join(folder, 'batch-2.png'), '--output', again);
    expect(stdout).toBe(`${again}\n`);
    expect(await pixels(again)).toEqual(await pixels(join(folder, 'batch-2.png')));
  });

  it('lets options change a picture’s settings', async () => {
    const first = join(folder, 'first.png');
    await generate('a fox', '--seed', '2', '--output', first);
    const other = join(folder, 'other.png');
    await generate('--from', first, '--seed', '3', '--output', other);
    expect(await pixels(other)).not.toEqual(await pixels(first));
  });

  it('redraws a picture and repaints under a mask', async () => {
    const photo = join(folder, 'photo.jpg');
    await sharp({ create: { width: 50, height: 37, channels: 3, background: '#4080c0' } })
      .jpeg()
      .toFile(photo);
    const output = join(folder, 'redrawn.png');
    const result = await generate('a fox', '--init-image', photo, '--strength', '0.5', '--output', output);
    expect(result.stderr).toMatch(/scaled and cut to 48x32/);
    const mask = join(folder, 'mask.png');
    await sharp({ create: { width: 48, height: 32, channels: 3, background: '#000' } })
      .png()
      .toFile(mask);
    const kept = join(folder, 'kept.png');
    await generate('a fox', '--init-image', output, '--mask', mask, '--output', kept);
    expect(await pixels(kept)).toEqual(await pixels(output));
  });

  it('never replaces a file unless told to', async () => {
    const output = join(folder, 'same.png');
    const argv = ['a fox', '--seed', '1', '--steps', '1', '--output', output];
    expect((await generate(...argv)).stdout).toBe(`${output}\n`);
    expect((await generate(...argv)).stdout).toBe(`${join(folder, 'same-1.png')}\n`);
    expect((await generate(...argv, '--overwrite')).stdout).toBe(`${output}\n`);
  });

  it('draws an empty prompt, and warns of a T5 prompt that is cut', async () => {
    expect((await generate('', '--steps', '1')).code).toBe(0);
    const { code, stderr } = await generate('a red fox and two cats', '--steps', '1', '--t5-tokens', '3');
    expect(code).toBe(0);
    expect(stderr).toMatch(/^Warning: .*cats/);
  });

  it('shows the picture on a terminal that can, before its path', async () => {
    const argv = [
      'generate',
      'a fox',
      '--device',
      'cpu',
      '--model',
      model,
      '--steps',
      '1',
      '--output',
      join(folder, 'shown.png'),
    ];
    const terminal = { isTTY: true, environment: { COLORTERM: 'truecolor' } };
    expect((await mmditx(argv, undefined, terminal)).stdout).toMatch(/▀.*shown\.png\n$/s);
    expect((await mmditx([...argv, '--no-show'], undefined, terminal)).stdout).not.toContain('▀');
    expect((await mmditx([...argv, '--json'], undefined, terminal)).stdout).not.toContain('▀');
  });

  it('says what it loads and how far it is on a terminal', async () => {
    const argv = [
      'generate',
      'a fox',
      '--device',
      'cpu',
      '--model',
      model,
      '--steps',
      '2',
      '--output',
      join(folder, 'bar.png'),
    ];
    const { stderr } = await mmditx(argv, undefined, { isTTY: true });
    expect(stderr).toMatch(/^Loading tiny\.safetensors\.\n.* 0\/2 steps.* 2\/2 steps/s);
    expect((await mmditx([...argv, '--quiet'], undefined, { isTTY: true })).stderr).toBe('');
  });

  it('tells other programs about each picture as JSON', async () => {
    const output = join(folder, 'json-{index}.png');
    const { stdout } = await generate(
      'a fox',
      '--seed',
      '18446744073709551615',
      '--batch',
      '2',
      '--json',
      '--output',
      output,
    );
    const lines = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    expect(lines.map(({ path, seed }) => [path, seed])).toEqual(
      ['0', '1'].map((index) => [output.replace('{index}', index), '18446744073709551615']),
    );
  });

  it('leaves nothing behind when it is stopped', async () => {
    const empty = await mkdtemp(join(folder, 'stopped-'));
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 300);
    const argv = [
      'generate',
      'a fox',
      '--device',
      'cpu',
      '--model',
      model,
      '--steps',
      '10000',
      '--output',
      join(empty, 'x.png'),
    ];
    const { code, stdout } = await mmditx(argv, stop.signal);
    expect({ code, stdout, files: await readdir(empty) }).toEqual({ code: 130, stdout: '', files: [] });
  });
});

describe('generate refuses in one sentence', () => {
  const cases: Record<string, [string[], RegExp]> = {
    'no prompt': [[], /no prompt/],
    'a size that is no multiple of 16': [['a fox', '--size', '100x64'], /width is 100/],
    'a size beyond the table': [['a fox', '--width', '1024'], /width is 1024/],
    'a picture with settings that is no PNG': [['--from', 'test/golden/tokens.json'], /PNG/],
    'steps that are none': [['a fox', '--steps', '0'], /steps is 0/],
    'a seed beyond 64 bits': [['a fox', '--seed', '18446744073709551616'], /seed is 18446744073709551616/],
    'a strength above 1': [
      ['a fox', '--init-image', 'models/small/sheet/sheet.png', '--size', '32x32', '--strength', '1.5'],
      /strength is 1.5/,
    ],
    'layers that are not there': [['a fox', '--slg', '9', '--slg-end', '1'], /no layer 9.*0 to 2/],
    'a pattern with an unknown placeholder': [['a fox', '--output', '{name}.png'], /\{name\}/],
    'a picture that does not exist': [['a fox', '--init-image', 'nowhere.png'], /nowhere\.png/],
    'a strength without a picture': [['a fox', '--strength', '0.5'], /--strength needs a picture.*--init-image/],
    'a mask without a picture': [['a fox', '--mask', 'mask.png'], /--init-image/],
    'an output in a file': [['a fox', '--output', 'package.json/fox.png'], /package\.json/],
    'an enormous prompt': [['fox '.repeat(30_000)], /100,?000/],
    'a device that is not there': [['a fox', '--device', 'dml'], /dml/],
  };
  for (const [name, [argv, message]] of Object.entries(cases)) {
    it(name, async () => {
      const { code, stdout, stderr } = await generate(...argv);
      expect(code).toBe(1);
      expect(stdout).toBe('');
      expect(stderr).toMatch(message);
      expect(stderr.trim().split('\n')).toHaveLength(1);
    });
  }

  it.each([
    ['a file that does not exist', 'nowhere.safetensors', /nowhere\.safetensors/],
    ['a file that is no checkpoint', 'package.json', /package\.json/],
  ])('%s as the model', async (_name, path, message) => {
    const { code, stderr } = await mmditx(['generate', 'a fox', '--device', 'cpu', '--model', path]);
    expect(code).toBe(1);
    expect(stderr).toMatch(message);
  });

  it('a model whose tokenizers are missing', async () => {
    const tiny = 'test/golden/tiny_sd35.safetensors';
    const { code, stderr } = await mmditx(['generate', 'a fox', '--device', 'cpu', '--model', tiny]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringMatching(/^mmditx: .*CLIP tokenizer.*\n$/) });
    const named = await mmditx([
      'generate',
      'a fox',
      '--device',
      'cpu',
      '--model',
      tiny,
      '--clip-tokenizer',
      'nowhere.json',
    ]);
    expect(named).toMatchObject({ code: 1, stderr: expect.stringMatching(/^mmditx: .*nowhere\.json.*\n$/) });
  });

  it('a model without a VAE', async () => {
    const path = join(folder, 'blind.safetensors');
    await writeTinyModel(path, { without: 'first_stage_model' });
    const { code, stderr } = await mmditx(['generate', 'a fox', '--device', 'cpu', '--model', path]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringMatching(/^mmditx: There is no VAE in .*\n$/) });
  });

  it.each(['model.diffusion_model.context_embedder.weight', 'first_stage_model.decoder.conv_out.weight'])(
    'a model with a NaN in %s, and leaves no picture',
    async (broken) => {
      const path = join(folder, 'broken.safetensors');
      await writeTinyModel(path, { broken });
      const output = join(folder, 'broken.png');
      const { code, stdout, stderr } = await mmditx([
        'generate',
        'a fox',
        '--device',
        'cpu',
        '--model',
        path,
        '--output',
        output,
      ]);
      expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
      expect(stderr).toMatch(new RegExp(`^mmditx: .*${broken}.*not finite.*\n$`));
      expect(existsSync(output)).toBe(false);
    },
  );

  it('a full disk, after the work', async () => {
    const output = join(folder, 'full.png');
    await symlink('/dev/full', output);
    const { code, stdout, stderr } = await generate('a fox', '--output', output, '--overwrite');
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^mmditx: Cannot write .*full\.png: the disk is full.*\n$/);
  });

  it.each(['/proc/nowhere/fox.png', '/proc/fox.png'])('the output %s, before the work', async (output) => {
    const { code, stderr } = await generate('a fox', '--steps', '10000', '--output', output);
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringMatching(/^mmditx: Cannot write \/proc.*\n$/) });
  });

  it('a mask of other proportions', async () => {
    const [picture, mask] = [join(folder, 'wide.png'), join(folder, 'high.png')];
    const of = (width: number, height: number) => sharp({ create: { width, height, channels: 3, background: '#fff' } });
    await Promise.all([of(64, 32).toFile(picture), of(32, 64).toFile(mask)]);
    const { code, stderr } = await generate('a fox', '--init-image', picture, '--mask', mask);
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringMatching(/32x64 .* 64x32.*proportions/) });
  });

  it('a truncated model', async () => {
    const path = join(folder, 'cut.safetensors');
    const bytes = await readFile(model);
    await writeFile(path, bytes.subarray(0, bytes.length / 2));
    const { code, stderr } = await mmditx(['generate', 'a fox', '--device', 'cpu', '--model', path]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^mmditx: .*cut\.safetensors/);
  });

  it.each([
    [['generate', 'a fox', '--steps', 'many'], /many/],
    [['generate', 'a fox', '--sampler', 'ddim'], /ddim/],
    [['generate', 'a fox', '--stesp', '3'], /--stesp.*\n?.*--steps/],
    [['paint'], /paint/],
  ])('wrong usage: %j', async (argv, message) => {
    const { code, stderr } = await mmditx(argv);
    expect(code).toBe(2);
    expect(stderr).toMatch(message);
  });
});

describe('the other commands', () => {
  it('tell their version and their help', async () => {
    expect(await mmditx(['--version'])).toEqual({ code: 0, stdout: `${VERSION}\n`, stderr: '' });
    expect(VERSION).toBe(JSON.parse(await readFile('package.json', 'utf8')).version);
    const help = await mmditx(['generate', '--help']);
    expect(help.code).toBe(0);
    expect(help.stdout).toMatch(/Examples:/);
  });

  it('inspect a checkpoint', async () => {
    const { code, stdout } = await mmditx(['inspect', model]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/transformer/i);
    expect(stdout).toMatch(/T5/);
    const json = await mmditx(['inspect', '--json', model]);
    expect(JSON.parse(json.stdout)).toMatchObject({ parts: expect.anything() });
  });
});
