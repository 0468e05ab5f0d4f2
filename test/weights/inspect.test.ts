import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { CLIP_L, SD3_MEDIUM_TRANSFORMER, SD3_VAE, SD35_MEDIUM_TRANSFORMER } from '../../src/models/config.ts';
import { floats, type TensorData } from '../../src/tensor/data.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { clipTensors, transformerTensors, vaeTensors } from '../../src/weights/expected.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { findNonFinite, formatInspection, inspectCheckpoint } from '../../src/weights/inspect.ts';
import { fileWeights } from '../../src/weights/layouts.ts';
import { openWeightsFile } from '../../src/weights/open.ts';
import { bytesSource, headerOf, prefixed, shapesSource, tensorsSource } from './sources.ts';

const golden = await readFile(new URL('../golden/tiny_sd35.safetensors', import.meta.url));

describe('inspection', () => {
  test('of the released single file, by its header alone', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
    try {
      const path = join(folder, 'sd3.5_medium.safetensors');
      const { header, size } = headerOf(
        new Map([
          ...prefixed('model.diffusion_model.', transformerTensors(SD35_MEDIUM_TRANSFORMER)),
          ...prefixed('first_stage_model.', vaeTensors(SD3_VAE)),
        ]),
      );
      await writeFile(path, header);
      // A hole: the file has its full length and takes no room on the disk.
      await truncate(path, size);
      const source = await fileSource(path);
      const inspection = await inspectCheckpoint([source]);
      await source.close();

      expect(inspection.model).toBe('Stable Diffusion 3.5 Medium');
      const [transformer, vae] = inspection.parts;
      expect(transformer).toMatchObject({ part: 'transformer', parameters: 2_469_663_936, tensors: 665, missing: [] });
      expect(transformer?.encodings).toEqual({ float16: 665 });
      expect(vae).toMatchObject({ part: 'vae', parameters: 83_819_683, tensors: 244 });
      expect(transformer!.bytes + vae!.bytes).toBe(5_106_967_238);
      expect(inspection.missingParts).toEqual(['clipL', 'clipG', 't5']);

      const text = formatInspection(inspection);
      expect(text).toContain('Model: Stable Diffusion 3.5 Medium');
      expect(text).toContain('2,469,663,936 parameters in 665 tensors, 4.60 GiB');
      expect(text).toContain('24 blocks 1536 wide, 24 heads of 64, QK norm, dual attention in 13 blocks');
      expect(text).toContain('Not in this file: CLIP-L text encoder, CLIP-G text encoder, T5 text encoder');
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  test('of a whole small model', async () => {
    const inspection = await inspectCheckpoint([bytesSource(golden, 'tiny')]);
    expect(inspection.model).toBe('a model of the Stable Diffusion 3 architecture, of its own size');
    expect(inspection.missingParts).toEqual([]);
    // CLIP-L's projection.
    expect(inspection.unusedTensors).toBe(1);
    expect(inspection.parts.reduce((sum, { tensors }) => sum + tensors, 0)).toBe(510);
    expect(formatInspection(inspection)).toContain('Not in this file: nothing');
  });

  test('names SD3 Medium', async () => {
    const inspection = await inspectCheckpoint([shapesSource(transformerTensors(SD3_MEDIUM_TRANSFORMER))]);
    expect(inspection.model).toBe('Stable Diffusion 3 Medium');
    expect(formatInspection(inspection)).toContain('no QK norm, no dual attention');
  });

  test('describes a part with missing tensors instead of failing', async () => {
    const shapes = new Map(clipTensors(CLIP_L));
    shapes.delete('text_model.encoder.layers.3.mlp.fc2.bias');
    const inspection = await inspectCheckpoint([shapesSource(shapes, 'cut')]);
    expect(inspection.parts[0]).toMatchObject({
      part: 'clipL',
      tensors: 195,
      missing: ['text_model.encoder.layers.3.mlp.fc2.bias'],
      problem: /lacks 1 of the 196 tensors/,
    });
    expect(formatInspection(inspection)).toMatch(/problem: cut lacks 1 of/);

    shapes.delete('text_model.embeddings.token_embedding.weight');
    const worse = await inspectCheckpoint([shapesSource(shapes, 'cut')]);
    expect(worse.parts[0]?.config).toBeUndefined();
    expect(formatInspection(worse)).toMatch(/problem: cut lacks the tensor text_model\.embeddings/);
  });

  test('tells that parts do not belong together', async () => {
    const inspection = await inspectCheckpoint([
      shapesSource(transformerTensors(SD3_MEDIUM_TRANSFORMER), 'a'),
      shapesSource(vaeTensors({ ...SD3_VAE, latentChannels: 8 }), 'b'),
    ]);
    expect(inspection.mismatch).toMatch(/b has a VAE of 8 latent channels/);
    expect(formatInspection(inspection)).toContain('Problem: The parts are of different models');
  });

  test('tells which tokenizers come along', async () => {
    const metadata = { 'mmditx.tokenizer.t5': '{}' };
    const inspection = await inspectCheckpoint([shapesSource(clipTensors(CLIP_L), 'x', metadata)]);
    expect(inspection.tokenizers).toEqual(['t5']);
    expect(formatInspection(inspection)).toContain('Tokenizers included: t5');
  });
});

describe('values that are not finite', () => {
  async function find(tensors: Record<string, TensorData>) {
    return findNonFinite({ tensors: await fileWeights(await openWeightsFile(tensorsSource(tensors))) });
  }

  test('are found in every number format', async () => {
    const found = await find({
      float64: { dtype: 'float64', shape: [2], data: Float64Array.of(1e308, Number.NaN) },
      float32: floats([3], [3e38, Number.NEGATIVE_INFINITY, Number.NaN]),
      // Largest, infinity, NaN.
      float16: { dtype: 'float16', shape: [3], data: Uint16Array.of(0x7bff, 0xfc00, 0x7e01) },
      bfloat16: { dtype: 'bfloat16', shape: [3], data: Uint16Array.of(0x7f7f, 0x7f80, 0xffff) },
      // 448, the largest, lies beside NaN.
      float8e4m3: { dtype: 'float8e4m3', shape: [3], data: Uint8Array.of(0x7e, 0x7f, 0xff) },
      float8e5m2: { dtype: 'float8e5m2', shape: [3], data: Uint8Array.of(0x7b, 0x7c, 0xfe) },
    });
    expect(Object.fromEntries(found.map(({ name, count }) => [name, count]))).toEqual({
      float64: 1,
      float32: 2,
      float16: 2,
      bfloat16: 2,
      float8e4m3: 2,
      float8e5m2: 2,
    });
  });

  test('are counted across chunks that are a few MiB each', async () => {
    const values = new Float32Array(2_500_000);
    values[0] = values[1_200_000] = values[2_499_999] = Number.NaN;
    const source = tensorsSource({ big: floats([2_500_000], values) });
    let largest = 0;
    const watched = {
      ...source,
      read: (offset: number, length: number) => {
        largest = Math.max(largest, length);
        return source.read(offset, length);
      },
    };
    const tensors = await fileWeights(await openWeightsFile(watched));
    largest = 0;
    const found = await findNonFinite({ tensors });
    expect(found).toEqual([{ name: 'big', count: 3 }]);
    expect(largest).toBeLessThanOrEqual(4 * 1024 * 1024);
  });

  test('are absent from the reference model, and the search can be stopped', async () => {
    const { parts } = await openCheckpoint([bytesSource(golden)]);
    expect(await findNonFinite(parts.transformer!)).toEqual([]);
    const signal = AbortSignal.abort(new Error('enough'));
    await expect(findNonFinite(parts.transformer!, { signal })).rejects.toThrow('enough');
  });
});
