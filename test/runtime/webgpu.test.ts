import { existsSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { describe, expect, it } from 'vitest';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import { loadClip, loadT5 } from '../../src/models/text-encoders.ts';
import { loadTransformer } from '../../src/models/transformer.ts';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import type { FloatTensor, TensorData } from '../../src/tensor/index.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { boundWeights, runSmall, training } from '../support/programs.ts';
import { cpu, maxDifference } from '../support/run.ts';

// SwiftShader, Chromium's software driver for Vulkan: slow, but it computes in float32 like a graphics card. It has
// no float16 and subgroups of four lanes, so what is right here does not rely on either. The Vulkan loader reads these
// variables when the first session starts.
process.env.VK_DRIVER_FILES ??= '/usr/lib/chromium/vk_swiftshader_icd.json';
process.env.XDG_RUNTIME_DIR ??= tmpdir();
const absent = !process.env.VK_DRIVER_FILES.split(':').every(existsSync);
const note = absent ? ` (skipped: no ${process.env.VK_DRIVER_FILES}; Debian's chromium has it)` : '';

const webgpu = nodeRuntime({ device: 'webgpu' });
const parts = (await goldenCheckpoint()).parts;

/** The golden tensors of a file as floats. */
function goldens(file: string): (name: string) => FloatTensor {
  const tensors = readGolden(file);
  return (name) => golden(tensors, name) as FloatTensor;
}

function expectClose(actual: TensorData, expected: TensorData, tolerance: number) {
  expect(actual.shape).toEqual(expected.shape);
  expect(maxDifference(actual, expected)).toBeLessThan(tolerance);
}

// Tolerances are about three times the errors reached here, which are no larger than those of the CPU.
describe.skipIf(absent)(`the networks on WebGPU agree with the reference implementations${note}`, () => {
  it('transformer, with layers skipped and without (reached 3.1e-6)', async () => {
    const get = goldens('mmdit');
    const transformer = loadTransformer(webgpu, parts.transformer!);
    const [context, pooled] = [get('B.in.context'), get('B.in.pooled')];
    const passes = [
      { context, pooled },
      { context, pooled, skipLayers: [1, 2] },
    ];
    const [whole, skipped] = await transformer.velocities(get('B.in.latent'), get('B.in.timestep').data, passes);
    expectClose(whole!, get('B.out'), 1e-5);
    expectClose(skipped!, get('B.out.skip1_2'), 1e-5);
    await transformer.dispose();
  });

  it('CLIP-L and CLIP-G (reached 2.4e-6)', async () => {
    const get = goldens('text');
    for (const [name, part] of [
      ['clip_l', parts.clipL],
      ['clip_g', parts.clipG],
    ] as const) {
      const clip = loadClip(webgpu, part!);
      const { hidden, pooled } = await clip.encode(get(`ids.${name}`));
      expectClose(hidden, get(`${name}.hidden_penultimate`), 1e-5);
      expectClose(pooled, get(`${name}.pooled`), 1e-5);
      await clip.dispose();
    }
  });

  it('T5 (reached 4.5e-6)', async () => {
    const get = goldens('text');
    const t5 = loadT5(webgpu, parts.t5!);
    expectClose(await t5.encode(get('ids.t5_77')), get('t5.out_77'), 1.5e-5);
    await t5.dispose();
  });

  it('VAE (reached 5.7e-6)', async () => {
    const get = goldens('vae');
    const vae = loadAutoencoder(webgpu, parts.vae!);
    expectClose(await vae.encode(get('B.in.image')), get('B.moments'), 2e-5);
    expectClose(await vae.decode(get('B.in.latent_scaled')), get('B.decoded'), 2e-5);
    await vae.dispose();
  });
});

describe.skipIf(absent)(`small programs on WebGPU agree with the CPU${note}`, () => {
  it.each([
    ['a loss and its gradients', training()],
    ['weights of a safetensors file, float16 among them', boundWeights()],
  ])('%s', async (_name, program) => {
    const expected = await runSmall(cpu, program);
    const actual = await runSmall(webgpu, program);
    expect(Object.keys(actual)).toEqual(Object.keys(expected));
    for (const [name, value] of Object.entries(expected)) expectClose(actual[name]!, value, 1e-5);
  });
});
