/** `mmditx probe`: one part of a model on tensors from a file, for people who compare implementations. */
import type { Command } from 'commander';
import { openFiles } from '../index.node.ts';
import { nodeRuntime } from '../runtime/node.node.ts';
import { writeSafetensorsFile } from '../weights/files.node.ts';
import type { Context } from './context.ts';
import {
  type Probe,
  type ProbeOutputs,
  probeClip,
  probeGradient,
  probeNoise,
  probeSample,
  probeT5,
  probeTransformer,
  probeVaeDecode,
  probeVaeEncode,
} from './probe-parts.ts';
import { openProbeTensors } from './probe-tensors.ts';
import { addDeviceOptions, addSamplingOptions, type DeviceFlags, layers, repeated, seed, shape } from './values.ts';
import { requireWritable } from './writable.ts';

interface FileFlags extends DeviceFlags {
  readonly model: readonly string[];
  readonly in: string;
  readonly out: string;
}

export function addProbe(program: Command, { signal }: Context): void {
  const probe = program
    .command('probe')
    .description('run one part of a model on tensors from a file, for comparing implementations');

  /** A part that needs a model and inputs. */
  const addPart = <Flags>(
    name: string,
    description: string,
    work: (probe: Probe, flags: Flags) => Promise<ProbeOutputs>,
  ): Command => {
    const command = probe
      .command(name)
      .description(description)
      .requiredOption('--model <file>', 'checkpoint; repeat it for models in several files', repeated)
      .requiredOption('--in <file>', 'safetensors file with the inputs')
      .requiredOption('--out <file>', 'safetensors file to write');
    return addDeviceOptions(command).action(async (flags: FileFlags & Flags) => {
      await requireWritable(flags.out);
      const { checkpoint, close } = await openFiles(flags.model);
      const inputs = await openProbeTensors(flags.in).catch(async (error) => {
        await close();
        throw error;
      });
      try {
        const outputs = await work({ checkpoint, runtime: nodeRuntime(flags), inputs, signal }, flags);
        await write(flags.out, outputs, signal);
      } finally {
        await Promise.all([close(), inputs.close()]);
      }
    });
  };

  addPart('clip_l', 'ids [B,77] -> hidden, pooled', (part) => probeClip('clipL', part));
  addPart('clip_g', 'ids [B,77] -> hidden, pooled', (part) => probeClip('clipG', part));
  addPart('t5', 'ids [B,T] -> hidden', probeT5);
  addPart('transformer', 'latent, timestep, context, pooled -> velocity', probeTransformer).option(
    '--skip-layers <list>',
    'blocks to leave out, such as 7,8,9',
    layers,
  );
  addPart('vae_encode', 'image [B,3,H,W] in [-1,1] -> moments', probeVaeEncode);
  addPart('vae_decode', 'latent, as the transformer has it -> image', probeVaeDecode);
  addSamplingOptions(
    addPart('sample', 'noise, context, pooled, negative_context, negative_pooled -> latent', probeSample),
  )
    .option('--slg-layers <list>', 'switch skip-layer guidance on with these blocks', layers)
    .option('--seed <number>', 'of the noise that stochastic samplers draw (default: 0)', seed);
  addPart('gradient', 'latent (clean), noise, sigma [B], context, pooled -> loss, grad.<parameter>', probeGradient);

  probe
    .command('noise')
    .description('-> noise')
    .requiredOption('--seed <number>', 'as in PyTorch on the CPU', seed)
    .requiredOption('--shape <lengths>', 'such as 1x16x8x8', shape)
    .requiredOption('--out <file>', 'safetensors file to write')
    .action(async (flags: { seed: number | bigint; shape: readonly number[]; out: string }) => {
      await requireWritable(flags.out);
      await write(flags.out, probeNoise(flags), signal);
    });
}

async function write(path: string, outputs: ProbeOutputs, signal: AbortSignal): Promise<void> {
  await writeSafetensorsFile(path, new Map(Object.entries(outputs)), {}, { signal });
}
