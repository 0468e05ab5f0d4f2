import { existsSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, relative, resolve } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import {
  SD3_MEDIUM_TRANSFORMER,
  SD3_VAE,
  SD35_LARGE_TRANSFORMER,
  SD35_MEDIUM_TRANSFORMER,
  type TransformerConfig,
} from '../../src/models/config.ts';
import { loadTransformer } from '../../src/models/transformer.ts';
import { elementCount, type FloatTensor, type TensorData } from '../../src/tensor/data.ts';
import { type Checkpoint, openCheckpoint, partNames, surveyFiles } from '../../src/weights/checkpoint.ts';
import { officialTransformer } from '../../src/weights/diffusers.ts';
import { type TensorShapes, transformerTensors, vaeTensors } from '../../src/weights/expected.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';
import { serializeSafetensors } from '../../src/weights/safetensors.ts';
import { readFloats, type WeightTensor } from '../../src/weights/stored.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';
import { bytesSource, shapesSource } from './sources.ts';

const fixtures = resolve('test/fixtures/layouts');

const sources: FileSource[] = [];
afterAll(() => Promise.all(sources.map((source) => source.close())));

async function open(path: string): Promise<FileSource> {
  const source = await fileSource(path);
  sources.push(source);
  return source;
}

async function openFiles(...paths: string[]): Promise<Checkpoint> {
  return openCheckpoint(await Promise.all(paths.map(open)));
}

async function expectSameWeights(actual: Checkpoint, expected: Checkpoint): Promise<void> {
  expect(Object.keys(actual.parts)).toEqual(Object.keys(expected.parts));
  for (const part of partNames) {
    expect(actual.parts[part]?.config).toEqual(expected.parts[part]?.config);
    const tensors = actual.parts[part]!.tensors;
    expect([...tensors.keys()]).toEqual([...expected.parts[part]!.tensors.keys()]);
    for (const [name, weight] of expected.parts[part]!.tensors) {
      expect(tensors.get(name)!.shape, name).toEqual(weight.shape);
      expect(await readFloats(tensors.get(name)!), name).toEqual(await readFloats(weight));
    }
  }
}

describe('a model that PyTorch wrote in both layouts', async () => {
  const official = await openFiles(join(fixtures, 'official.safetensors'));
  const paths = await modelFiles(join(fixtures, 'diffusers'));

  test('is the same, with queries, keys and values in different shards', async () => {
    const checkpoint = await openFiles(...paths);
    await expectSameWeights(checkpoint, official);
    const { spans } = checkpoint.parts.transformer!.tensors.get('joint_blocks.1.x_block.attn.qkv.weight')!;
    expect(spans.map(({ name }) => name.slice(-11))).toEqual(['to_q.weight', 'to_k.weight', 'to_v.weight']);
    expect(spans[0]!.source.name).not.toBe(spans[1]!.source.name);
  });

  test('is the same with the shards in another order', async () => {
    await expectSameWeights(await openFiles(...paths.toReversed()), official);
  });

  test('leaves no weight unused', async () => {
    expect((await surveyFiles(await Promise.all(paths.map(open)))).unused).toBe(0);
  });

  test('is incomplete without one of its shards', async () => {
    const most = paths.filter((path) => !path.includes('00002-of'));
    await expect(openFiles(...most)).rejects.toMatchObject({
      code: 'missing-part',
      message:
        /00001-of-00003.* and .*00003-of-00003.* lacks .* of the transformer \(joint_blocks\.1\.x_block\.attn\.qkv/,
    });
  });

  test('has the same VAE in the names of older versions', async () => {
    const { parts } = await openFiles(join(fixtures, 'vae-old-names.safetensors'));
    expect(parts.vae!.config).toEqual(official.parts.vae!.config);
    const { tensors } = parts.vae!;
    for (const [name, weight] of official.parts.vae!.tensors) {
      expect(await readFloats(tensors.get(name)!), name).toEqual(await readFloats(weight));
    }
  });
});

interface Names {
  /** Of diffusers to official ones; blocks are written `{i}`. */
  readonly transformer: Readonly<Record<string, string>>;
  readonly vae: Readonly<Record<string, string>>;
  readonly thirds: Readonly<Record<string, number>>;
  readonly swapped: Readonly<Record<string, 'always' | 'in the last block'>>;
  readonly linear: readonly string[];
}
const names: Names = JSON.parse(readFileSync(join(fixtures, 'names.json'), 'utf8'));

/** A tensor of diffusers and the rows of the official one that it has, in order. */
interface Moved {
  readonly name: string;
  readonly shape: readonly number[];
  readonly from: string;
  readonly rows: readonly (readonly [number, number])[];
}

/** What diffusers makes of official tensors, by the list of released names. */
function movedTensors(part: 'transformer' | 'vae', official: TensorShapes): Moved[] {
  const blocks = [...official.keys()].map((name) => Number(/^joint_blocks\.(\d+)\./.exec(name)?.[1] ?? 0));
  const last = Math.max(...blocks);
  return Object.entries(names[part]).flatMap(([template, from]): Moved[] => {
    const indices = template.includes('{i}') ? Array.from({ length: last + 1 }, (_, i) => i) : [last];
    return indices.flatMap((i) => {
      const shape = official.get(from.replace('{i}', `${i}`));
      if (!shape) return [];
      const [rows = 1, ...rest] = shape;
      const third = names.thirds[template];
      const swapped = names.swapped[template] === 'always' || (names.swapped[template] && i === last);
      const ranges: [number, number][] =
        third !== undefined
          ? [[(third * rows) / 3, ((third + 1) * rows) / 3]]
          : swapped
            ? [
                [rows / 2, rows],
                [0, rows / 2],
              ]
            : [[0, rows]];
      const count = third !== undefined ? rows / 3 : rows;
      return {
        name: template.replace('{i}', `${i}`),
        shape: names.linear.includes(template) ? [count, rest[0]!] : [count, ...rest],
        from: from.replace('{i}', `${i}`),
        rows: ranges,
      };
    });
  });
}

/** Every row of every weight comes from where the list says. */
function expectMoved(tensors: ReadonlyMap<string, WeightTensor>, moved: readonly Moved[]): void {
  const starts = new Map<string, number>();
  const bytesPerRow = ({ shape }: { shape: readonly number[] }) => 2 * elementCount(shape.slice(1));
  let end = Math.min(...[...tensors.values()].flatMap(({ spans }) => spans.map(({ offset }) => offset)));
  for (const { name, shape } of moved) {
    starts.set(name, end);
    end += 2 * elementCount(shape);
  }
  /** Where each official row lies: offsets of runs of rows, by the official row at which they begin. */
  const expected = new Map<string, { row: number; offset: number }[]>();
  for (const tensor of moved) {
    let offset = starts.get(tensor.name)!;
    for (const [from, to] of tensor.rows) {
      expected.set(tensor.from, [...(expected.get(tensor.from) ?? []), { row: from, offset }]);
      offset += (to - from) * bytesPerRow(tensor);
    }
  }
  expect(tensors.size).toBe(expected.size);
  for (const [name, runs] of expected) {
    let row = 0;
    const actual = tensors.get(name)!.spans.map(({ shape, offset, byteLength }) => {
      const at = { row, offset };
      row += byteLength / bytesPerRow({ shape: shape.length ? shape : [1] });
      return at;
    });
    expect(actual, name).toEqual(runs.toSorted((a, b) => a.row - b.row));
  }
}

describe('the released models in the layout of diffusers, by their names and shapes', () => {
  const shapesOf = (moved: readonly Moved[]) => new Map(moved.map(({ name, shape }) => [name, shape]));

  test.each<[string, TransformerConfig, number]>([
    ['SD3.5 Medium', SD35_MEDIUM_TRANSFORMER, 909],
    ['SD3 Medium', SD3_MEDIUM_TRANSFORMER, 683],
    ['SD3.5 Large', SD35_LARGE_TRANSFORMER, 1227],
  ])('%s', async (_, config, count) => {
    const moved = movedTensors('transformer', transformerTensors(config));
    const { parts } = await openCheckpoint([shapesSource(shapesOf(moved))]);
    expect(parts.transformer?.config).toEqual(config);
    expect(moved).toHaveLength(count);
    expectMoved(parts.transformer!.tensors, moved);
  });

  test('the VAE', async () => {
    const moved = movedTensors('vae', vaeTensors(SD3_VAE));
    const { parts } = await openCheckpoint([shapesSource(shapesOf(moved))]);
    expect(parts.vae?.config).toEqual(SD3_VAE);
    expect(parts.vae!.tensors.get('decoder.mid.attn_1.q.weight')?.shape).toEqual([512, 512, 1, 1]);
    expectMoved(parts.vae!.tensors, moved);
  });

  const list = new URL('../../../shared/keys.json', import.meta.url);
  test.skipIf(!existsSync(list))('the list of the released files (skipped where ../shared is absent)', async () => {
    const keys = JSON.parse(await readFile(list, 'utf8'));
    for (const [part, shapes, table] of [
      ['transformer', keys.diffusers_transformer, keys.map_diffusers_from_official],
      ['vae', keys.diffusers_vae, keys.map_diffusers_vae_from_official],
    ] as const) {
      const moved = Object.entries<{ from: string; rows?: [number, number]; swap_halves?: true }>(table).map(
        ([name, { from, rows, swap_halves }]): Moved => {
          const [count] = shapes[name] as [number];
          const halves = [
            [count / 2, count],
            [0, count / 2],
          ] as const;
          return {
            name,
            shape: shapes[name],
            from: from.replace(/^(model\.diffusion_model|first_stage_model)\./, ''),
            rows: swap_halves ? halves : [rows ?? [0, count]],
          };
        },
      );
      const { parts } = await openCheckpoint([shapesSource(shapesOf(moved))]);
      expectMoved(parts[part]!.tensors, moved);
    }
  });
});

describe('the reference model, rewritten for diffusers', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
  afterAll(() => rm(folder, { recursive: true }));
  const official = await goldenCheckpoint();

  /** As the hub's cache has them: names that are links to contents elsewhere. */
  async function save(name: string, tensors: ReadonlyMap<string, TensorData>, metadata = {}): Promise<void> {
    const blob = join(folder, 'blobs', name.replaceAll('/', '-'));
    const path = join(folder, 'snapshots', name);
    await Promise.all([blob, path].map((file) => mkdir(join(file, '..'), { recursive: true })));
    await writeFile(blob, serializeSafetensors(tensors, metadata));
    await symlink(relative(join(path, '..'), blob), path);
  }

  async function rewritten(part: 'transformer' | 'vae'): Promise<[string, TensorData][]> {
    const { tensors } = official.parts[part]!;
    const shapes = new Map([...tensors].map(([name, { shape }]) => [name, shape]));
    const moved = movedTensors(part, shapes).map(async ({ name, shape, from, rows }): Promise<[string, TensorData]> => {
      const { data } = await readFloats(tensors.get(from)!);
      const width = data.length / (shapes.get(from)![0] ?? 1);
      const pieces = rows.map(([begin, end]) => [...data.subarray(begin * width, end * width)]);
      return [name, { dtype: 'float32', shape, data: Float32Array.from(pieces.flat()) }];
    });
    return Promise.all(moved);
  }

  const transformer = await rewritten('transformer');
  const shards = ['a.safetensors', 'b.safetensors'];
  // Neighbours never lie in one shard.
  for (const [shard, name] of shards.entries()) {
    await save(`transformer/${name}`, new Map(transformer.filter((_, i) => i % 2 === shard)));
  }
  const weight_map = Object.fromEntries(transformer.map(([name], i) => [name, shards[i % 2]]));
  await writeFile(
    join(folder, 'snapshots/transformer/diffusion_pytorch_model.safetensors.index.json'),
    JSON.stringify({ metadata: { total_size: 1 }, weight_map }),
  );
  await save('vae/diffusion_pytorch_model.safetensors', new Map(await rewritten('vae')));
  const { parts } = await openFiles(...(await modelFiles(join(folder, 'snapshots'))));

  test('has the same configurations', () => {
    expect(parts.transformer?.config).toEqual(official.parts.transformer?.config);
    expect(parts.vae?.config).toEqual(official.parts.vae?.config);
  });

  test('its velocity agrees with the reference implementations', async () => {
    const tensors = readGolden('mmdit');
    const get = (name: string) => golden(tensors, name) as FloatTensor;
    const model = loadTransformer(cpu, parts.transformer!);
    try {
      const pass = { context: get('A.in.context'), pooled: get('A.in.pooled') };
      const [velocity] = await model.velocities(get('A.in.latent'), get('A.in.timestep').data, [pass]);
      expect(maxDifference(velocity!, get('A.out'))).toBeLessThan(6e-6);
    } finally {
      await model.dispose();
    }
  });

  test('its VAE agrees with the reference implementations', async () => {
    const tensors = readGolden('vae');
    const get = (name: string) => golden(tensors, name) as FloatTensor;
    const vae = loadAutoencoder(cpu, parts.vae!);
    try {
      expect(maxDifference(await vae.encode(get('B.in.image')), get('B.moments'))).toBeLessThan(5e-5);
      expect(maxDifference(await vae.decode(get('B.in.latent_scaled')), get('B.decoded'))).toBeLessThan(5e-5);
    } finally {
      await vae.dispose();
    }
  });
});

describe('weights in blocks', () => {
  /** Rows of 32 values in q8_0: a scale of 1 in half precision, and the row's number 32 times. */
  const rows = (numbers: readonly number[]) =>
    Uint8Array.from(numbers.flatMap((number) => [0x00, 0x3c, ...Array.from({ length: 32 }, () => number)]));

  function inBlocks(
    name: string,
    shape: readonly number[],
    bytes: Uint8Array,
    encoding: 'q8_0' | 'q4_k',
  ): WeightTensor {
    const source = bytesSource(bytes, 'model.gguf');
    return { name, shape, spans: [{ name, shape, encoding, offset: 0, byteLength: bytes.length, source }] };
  }

  const valuesOf = async (weight: WeightTensor) => {
    const { data } = await readFloats(weight);
    return Array.from({ length: data.length / 32 }, (_, row) => data[row * 32 + 31]);
  };

  test('keep their rows whole when halves are swapped and rows joined', async () => {
    const layer = 'transformer_blocks.3.attn.to_';
    const tensors = officialTransformer(
      new Map([
        ['norm_out.linear.weight', inBlocks('n', [4, 32], rows([1, 2, 3, 4]), 'q8_0')],
        [`${layer}v.weight`, inBlocks('v', [2, 32], rows([9, 10]), 'q8_0')],
        [`${layer}q.weight`, inBlocks('q', [2, 32], rows([5, 6]), 'q8_0')],
        [`${layer}k.weight`, inBlocks('k', [2, 32], rows([7, 8]), 'q8_0')],
      ]),
    );
    expect(await valuesOf(tensors.get('final_layer.adaLN_modulation.1.weight')!)).toEqual([3, 4, 1, 2]);
    const joint = tensors.get('joint_blocks.3.x_block.attn.qkv.weight')!;
    expect(joint.shape).toEqual([6, 32]);
    expect(await valuesOf(joint)).toEqual([5, 6, 7, 8, 9, 10]);
  });

  test('are refused where a block reaches from one half into the other', () => {
    const odd = inBlocks('n', [16, 48], new Uint8Array(144 * 3), 'q4_k');
    expect(() => officialTransformer(new Map([['norm_out.linear.weight', odd]]))).toThrow(
      /^Tensor "n" of model\.gguf has blocks of q4_k that cannot be put in the official order; .*\.$/,
    );
  });
});

describe('damaged files', () => {
  const moved = movedTensors('transformer', transformerTensors(SD3_MEDIUM_TRANSFORMER));
  const changed = (name: string, shape: readonly number[]) =>
    openCheckpoint([shapesSource(new Map([...moved.map((row) => [row.name, row.shape] as const), [name, shape]]))]);

  test.each<[string, number[]]>([
    ['transformer_blocks.5.attn.to_k.weight', [1536, 1535]],
    ['transformer_blocks.5.attn.to_v.weight', [1537, 1536]],
    ['transformer_blocks.5.attn.add_q_proj.bias', [1536, 1]],
    ['norm_out.linear.weight', [3071, 1536]],
    ['norm_out.linear.bias', []],
    ['transformer_blocks.23.norm1_context.linear.weight', [9216, 1536]],
  ])('%s of shape %j is refused by its name', async (name, shape) => {
    await expect(changed(name, shape)).rejects.toMatchObject({ code: 'bad-file', message: /^Tensor "/ });
  });

  test('a block far out is refused', async () => {
    await expect(changed('transformer_blocks.999999999.attn.to_out.0.weight', [1])).rejects.toThrow(
      /numbers its blocks up to 999999999/,
    );
  });

  test('names and shapes at random give a checkpoint or a sentence', async () => {
    const random = randomFloats([4000], 3).data.map((value) => Math.floor((value + 1) * 2 ** 14));
    let next = 0;
    const below = (limit: number) => random[next++]! % limit;
    const originals = [moved, movedTensors('vae', vaeTensors(SD3_VAE))];
    const outcomes = { opened: 0, refused: 0 };
    for (let round = 0; round < 120; round++) {
      const shapes = new Map(originals[round % 2]!.map(({ name, shape }) => [name, shape]));
      const keys = [...shapes.keys()];
      for (let change = below(3); change > 0; change--) {
        const name = keys[below(keys.length)]!;
        const shape = shapes.get(name) ?? [];
        shapes.delete(name);
        if (below(4) === 0) continue;
        const renamed = below(2) ? name : name.replace(/\d+/, `${below(50)}`);
        shapes.set(renamed, below(2) ? shape : shape.slice(below(2)).map((size) => (below(2) ? size : below(9))));
      }
      try {
        await openCheckpoint([shapesSource(shapes)]);
        outcomes.opened++;
      } catch (error) {
        expect(error).toBeInstanceOf(MmditxError);
        outcomes.refused++;
      }
    }
    expect(Math.min(outcomes.opened, outcomes.refused)).toBeGreaterThan(20);
  });
});
