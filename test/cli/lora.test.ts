import { copyFile, mkdtemp, readdir, readFile, rm, symlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { PassThrough } from 'node:stream';
import { Command } from 'commander';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { addLora } from '../../src/cli/lora.ts';
import { openFiles } from '../../src/index.node.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { openSafetensors, type SafetensorsFile } from '../../src/weights/safetensors.ts';
import { readFloats } from '../../src/weights/stored.ts';
import { maxDifference } from '../support/run.ts';

const KOHYA = resolve('test/golden/lora_kohya.safetensors');
const DIFFUSERS = resolve('test/golden/lora_diffusers.safetensors');
const MODEL = resolve('test/golden/tiny_sd35.safetensors');

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-lora-'));
});
afterAll(() => rm(folder, { recursive: true }));
const at = (name: string) => join(folder, name);

/** Runs the command; errors are thrown. */
async function lora(argv: readonly string[], signal = new AbortController().signal) {
  const [stdout, stderr] = [new PassThrough(), new PassThrough()];
  const program = new Command().exitOverride().configureOutput({ writeErr: () => undefined });
  addLora(program, { stdout, stderr, environment: {}, signal });
  await program.parseAsync(['lora', ...argv], { from: 'user' });
  return { stdout: String(stdout.read() ?? ''), stderr: String(stderr.read() ?? '') };
}

async function open(path: string): Promise<SafetensorsFile> {
  const source = await fileSource(path);
  const file = await openSafetensors(source);
  await source.close();
  return file;
}

const namesOf = async (path: string) => [...(await open(path)).tensors.keys()].sort();
const shapeOf = async (path: string, name: string) => (await open(path)).tensors.get(name)?.shape;

async function weights(path: string, name = 'joint_blocks.0.x_block.attn.qkv.weight') {
  const { checkpoint, close } = await openFiles([path]);
  const values = await readFloats(checkpoint.parts.transformer!.tensors.get(name)!);
  await close();
  return values;
}

describe('lora convert', () => {
  it.each([
    ['kohya', KOHYA],
    ['diffusers', DIFFUSERS],
  ] as const)('writes %s from either layout', async (format, golden) => {
    for (const source of [KOHYA, DIFFUSERS]) {
      const output = at(`new/${format}.safetensors`);
      const result = await lora(['convert', source, '--format', format, '-o', output]);
      expect(result).toEqual({ stdout: `${output}\n`, stderr: '' });
      expect(await namesOf(output)).toEqual(await namesOf(golden));
    }
  });

  it('keeps the number format, or takes another', async () => {
    const types = async (path: string) =>
      new Set([...(await open(path)).tensors].flatMap(([name, { dtype }]) => (name.endsWith('alpha') ? [] : dtype)));
    const [half, single, again] = ['half', 'single', 'again'].map((name) => at(`${name}.safetensors`)) as [
      string,
      string,
      string,
    ];
    await lora(['convert', DIFFUSERS, '-o', half]);
    expect(await types(half)).toEqual(new Set(['float16']));
    await lora(['convert', DIFFUSERS, '--dtype', 'fp32', '-o', single]);
    expect(await types(single)).toEqual(new Set(['float32']));
    await lora(['convert', single, '-o', again]);
    expect(await types(again)).toEqual(new Set(['float32']));
    await lora(['convert', single, '--dtype', 'bf16', '-o', again]);
    expect(await types(again)).toEqual(new Set(['bfloat16']));
  });
});

describe('lora resize', () => {
  const down = 'lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight';

  it('lowers the rank and tells what is kept', async () => {
    const output = at('rank2.safetensors');
    const { stdout, stderr } = await lora(['resize', KOHYA, '--rank', '2', '-o', output]);
    expect(stdout).toBe(`${output}\n`);
    expect(stderr).toMatch(
      /^Rank 4 to 2: keeps 77\.\d % of the changes in the mean, 7[45]\.\d % at least \(joint_blocks\..*\)\.\n$/m,
    );
    expect(await shapeOf(output, down)).toEqual([2, 128]);
    expect((await open(output)).metadata).toMatchObject({ ss_network_dim: '2' });
    expect(await namesOf(output)).toEqual(await namesOf(KOHYA));
  });

  it('keeps a share, in the layout that the file has, and tells of each layer', async () => {
    const output = at('kept.safetensors');
    const { stderr } = await lora(['resize', DIFFUSERS, '--keep', '0.8', '--max-rank', '3', '--details', '-o', output]);
    expect(stderr.match(/^joint_blocks\..*\.weight: rank 4 to [123], keeps \d+\.\d %$/gm)).toHaveLength(19);
    expect(await namesOf(output)).toEqual(await namesOf(DIFFUSERS));
  });

  it('is quiet where it is to be', async () => {
    const { stderr } = await lora(['resize', KOHYA, '--rank', '1', '--details', '-q', '-o', at('quiet.safetensors')]);
    expect(stderr).toBe('');
  });
});

describe('lora combine', () => {
  it('writes one LoRA of the sum of ranks, or resized', async () => {
    const down = 'lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight';
    const [sum, resized] = [at('sum.safetensors'), at('resized.safetensors')];
    await lora(['combine', `${KOHYA}:0.75`, `${DIFFUSERS}:0.25`, '-o', sum]);
    expect(await shapeOf(sum, down)).toEqual([8, 128]);
    // Both are the same LoRA.
    const { stderr } = await lora(['combine', `${KOHYA}:0.75`, `${DIFFUSERS}:0.25`, '--keep', '0.999', '-o', resized]);
    expect(await shapeOf(resized, down)).toEqual([4, 128]);
    expect(stderr).toMatch(/^Rank 8 to 4: keeps 100\.0 %/m);
    const [together, alone] = [at('together.safetensors'), at('alone.safetensors')];
    await lora(['merge', MODEL, '--lora', resized, '-o', together]);
    await lora(['merge', MODEL, '--lora', KOHYA, '-o', alone]);
    expect(maxDifference(await weights(together), await weights(alone))).toBeLessThan(2e-3);
  });
});

describe('lora merge', () => {
  it('writes a model with the changes of LoRAs at their strengths', async () => {
    const [once, twice] = [at('deep/once.safetensors'), at('twice.safetensors')];
    const { stdout, stderr } = await lora(['merge', MODEL, '--lora', KOHYA, '-o', once]);
    expect(stdout).toBe(`${once}\n`);
    expect(stderr).toMatch(/^19 weights are changed\.$/m);
    expect(stderr).not.toMatch(/Not in it|8 bits/);
    await lora(['merge', MODEL, '--lora', `${KOHYA}:0.5`, '--lora', `${DIFFUSERS}:0.5`, '-q', '-o', twice]);
    const [plain, merged] = [await weights(MODEL), await weights(once)];
    expect(maxDifference(merged, plain)).toBeGreaterThan(0.01);
    expect(maxDifference(merged, await weights(twice))).toBeLessThan(1e-3);
    // Stable Diffusion 3 leaves CLIP-L's projection out.
    const unused = 'text_encoders.clip_l.transformer.text_projection.weight';
    expect(await namesOf(once)).toEqual((await namesOf(MODEL)).filter((name) => name !== unused));
  });

  it('stops where it is told to and leaves nothing', async () => {
    const stop = new AbortController();
    stop.abort();
    await expect(lora(['merge', MODEL, '--lora', KOHYA, '-o', at('stopped.safetensors')], stop.signal)).rejects.toBe(
      stop.signal.reason,
    );
    expect((await readdir(folder)).filter((name) => name.includes('stopped'))).toEqual([]);
  });
});

describe('lora info', () => {
  it('tells layout, parts, ranks, alphas, targets and metadata', async () => {
    const { stdout } = await lora(['info', KOHYA]);
    const lines = stdout.split('\n');
    expect(lines[0]).toMatch(/lora_kohya\.safetensors: a LoRA in the layout of kohya, float16, [\d.]+ kB$/);
    expect(lines).toContainEqual(expect.stringMatching(/^transformer: 19 weights, rank 4, alpha \d/));
    expect(lines).toContain('  joint_blocks.*.x_block.attn.qkv  0-3');
    expect(lines).toContain('  joint_blocks.*.x_block.attn2.qkv  0-1');
    expect(lines).toContain('  "ss_network_module": "networks.lora_sd3"');
    expect((await lora(['info', DIFFUSERS])).stdout).toMatch(/in the layout of diffusers/);
  });

  it('tells it as JSON', async () => {
    const info = JSON.parse((await lora(['info', DIFFUSERS, '--json'])).stdout);
    expect(info).toMatchObject({ layout: 'diffusers', unused: [], metadata: { format: 'pt' } });
    expect(info.parts).toHaveLength(1);
    expect(info.parts[0]).toMatchObject({ part: 'transformer', weights: 19, ranks: [4], alphas: [4] });
    expect(info.parts[0].targets['joint_blocks.*.x_block.adaLN_modulation.1']).toEqual([2]);
  });
});

describe('lora refuses', () => {
  it.each([
    ['a model as a LoRA', () => ['info', MODEL], /holds no LoRA/],
    ['a LoRA as a model', () => ['merge', KOHYA, '--lora', KOHYA, '-o', at('x')], /lora_kohya/],
    ['a file that is not there', () => ['info', at('no')], /no such file/],
    ['to merge no LoRA', () => ['merge', MODEL, '-o', at('x')], /'--lora <file\[:strength\]>' not specified/],
    ['to merge at no strength', () => ['merge', MODEL, '--lora', `${KOHYA}:0`, '-o', at('x')], /change nothing/],
    ['no output', () => ['convert', KOHYA], /'-o, --output <file>' not specified/],
    ['an unknown layout', () => ['convert', KOHYA, '--format', 'peft', '-o', at('x')], /kohya, diffusers/],
    ['an unknown number format', () => ['convert', KOHYA, '--dtype', 'int8', '-o', at('x')], /fp16, bf16, fp32/],
    ['no rank', () => ['resize', KOHYA, '-o', at('x')], /Give either the rank/],
    ['rank 0', () => ['resize', KOHYA, '--rank', '0', '-o', at('x')], /The rank is 0/],
    ['a folder as output', () => ['convert', KOHYA, '-o', folder], /it is a folder/],
  ])('%s', async (_, argv, message) => {
    await expect(lora(argv())).rejects.toThrow(message);
    expect((await readdir(folder)).filter((name) => name === 'x' || name.endsWith('.tmp'))).toEqual([]);
  });

  it('to replace any of its inputs, by whatever path', async () => {
    const [style, other, link] = [at('style.safetensors'), at('other.safetensors'), at('link.safetensors')];
    await copyFile(KOHYA, style);
    await copyFile(MODEL, other);
    await symlink(style, link);
    for (const argv of [
      ['convert', style, '-o', style],
      ['resize', link, '--rank', '2', '-o', style],
      ['resize', style, '--rank', '2', '-o', link],
      ['combine', DIFFUSERS, style, '-o', style],
      ['merge', other, '--lora', style, '-o', style],
      ['merge', other, '--lora', style, '-o', other],
    ]) {
      await expect(lora(argv), argv.join(' ')).rejects.toThrow(
        /is one of the files that are read; choose another output/,
      );
    }
    expect(Buffer.compare(await readFile(style), await readFile(KOHYA))).toBe(0);
    expect(Buffer.compare(await readFile(other), await readFile(MODEL))).toBe(0);
  });
});
