/**
 * Running the transformer. Several passes over the same latent (with the prompt, with the negative prompt, with
 * layers skipped) share one set of weights: passes of equal text length run as one batch, and a pass that skips
 * layers shares the complete pass's work up to the first skipped block.
 */

import { MmditxError } from '../errors.ts';
import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import { oneAtATime } from '../runtime/turns.ts';
import type { FloatTensor } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { batchItems, joinBatches, repeatTo } from './batches.ts';
import { bindWeights, compileBound, type NetworkOptions } from './bind.ts';
import type { TransformerConfig } from './config.ts';
import { type Lazy, lazily } from './lazily.ts';
import { centreCorner, mmditxSegment, stageCount, stageOf, timestepEmbedding } from './mmditx.ts';
import type { StepCache } from './step-cache.ts';

/** One evaluation of the model on the latent at hand. */
export interface TransformerPass {
  /** [1 or batch, length, contextWidth] */
  readonly context: FloatTensor;
  /** [1 or batch, pooledWidth] */
  readonly pooled: FloatTensor;
  /** Indices of blocks to leave out (skip-layer guidance; Stability-AI/sd3.5, `skip_layers`). */
  readonly skipLayers?: readonly number[];
}

export interface VelocityOptions extends RunOptions {
  /** Reuses work of earlier evaluations of the same sampling run. */
  readonly cache?: StepCache | undefined;
}

export interface Transformer {
  readonly config: TransformerConfig;
  /**
   * The velocity that each pass predicts for a noisy latent.
   * @param latent [batch, inChannels, height, width], sides multiples of the patch size and within the position table
   * @param timesteps 1000 * sigma of each item
   * @returns one velocity [batch, outChannels, height, width] for each pass
   */
  velocities(
    latent: FloatTensor,
    timesteps: ArrayLike<number>,
    passes: readonly TransformerPass[],
    options?: VelocityOptions,
  ): Promise<FloatTensor[]>;
  dispose(): Promise<void>;
}

/** Beyond this many image tokens, passes run one after the other: a batch would cost memory and gain nothing. */
const LARGEST_BATCH_TOKENS = 2048;

/** What goes into a segment and comes out of it. */
type Flow = Readonly<Record<string, FloatTensor>>;

/** Prepares a checkpoint's transformer; its weights load at the first evaluation. */
export function loadTransformer(
  runtime: Runtime,
  part: PartWeights<TransformerConfig>,
  options: NetworkOptions = {},
): Transformer {
  const { config } = part;
  const bound = bindWeights(part, options);
  const stages = stageCount(config);
  /** Stages where the network is cut, so that the ranges between them run apart. */
  let cuts = [0, stages];
  /** By the stage they start at. */
  const segments = new Map<number, Segment>();
  // An evaluation that cuts the network elsewhere must not do so under one that is running.
  const inTurn = oneAtATime();

  const segmentFrom = (start: number): Segment => {
    const known = segments.get(start);
    if (known) return known;
    const end = cuts[cuts.indexOf(start) + 1]!;
    const program = lazily(() => compileBound(runtime, mmditxSegment(config, bound.weights, start, end), bound));
    const segment = { start, end, program };
    segments.set(start, segment);
    return segment;
  };
  const dispose = async (unwanted: readonly Segment[]) => {
    for (const { start } of unwanted) segments.delete(start);
    await Promise.all(unwanted.map(({ program }) => program.dispose()));
  };
  /** Cuts stay, as guidance comes and goes; segments that no new one falls into are kept. */
  const cutAt = async (edges: readonly number[]) => {
    cuts = [...new Set([...cuts, ...edges])].sort((a, b) => a - b);
    await dispose([...segments.values()].filter(({ start, end }) => edges.some((edge) => start < edge && edge < end)));
  };

  return {
    config,
    dispose: () => inTurn(() => dispose([...segments.values()])),
    velocities: (latent, timesteps, passes, options) => inTurn(() => evaluate(latent, timesteps, passes, options)),
  };

  async function evaluate(
    latent: FloatTensor,
    timesteps: ArrayLike<number>,
    passes: readonly TransformerPass[],
    { cache, signal }: VelocityOptions = {},
  ): Promise<FloatTensor[]> {
    for (const { skipLayers } of passes) requireLayers(config, skipLayers ?? []);
    const skipped = passes.map(({ skipLayers }) => new Set(skipLayers?.map(stageOf)));
    const [firstBlock, secondBlock, output] = [stageOf(0), stageOf(1), stageOf(config.depth)];
    await cutAt([...skipped.flatMap(edgesOf), ...(cache ? [firstBlock, secondBlock, output] : [])]);

    const [batch, , height, width] = latent.shape as [number, number, number, number];
    const [rows, columns] = [height / config.patchSize, width / config.patchSize];
    const corner = centreCorner(config.tableSize, rows, columns);
    const timestep = repeatTo(timestepEmbedding(timesteps, config.timestepWidth), batch);

    /** Takes every pass through the segments between two cuts; passes with the same tokens share the work. */
    const advance = async (flows: readonly Flow[], from: number, to: number): Promise<readonly Flow[]> => {
      let current = flows;
      for (const start of cuts.filter((cut) => from <= cut && cut < to)) {
        const { program } = segmentFrom(start);
        const wanted = new Set(current.filter((_, i) => !skipped[i]!.has(start)));
        const results = new Map<Flow, Flow>();
        for (const group of batches([...wanted], batch * rows * columns)) {
          signal?.throwIfAborted();
          const executable = await program.get();
          const joined = (await executable.run({ ...joinFlows(group), corner }, { signal })) as Flow;
          for (const [i, flow] of group.entries()) results.set(flow, itemsOf(joined, i * batch, batch));
        }
        current = current.map((flow, i) => (skipped[i]!.has(start) ? flow : results.get(flow)!));
      }
      return current;
    };

    let flows: readonly Flow[] = inputs(latent, timestep, passes);
    if (cache) {
      const embedded = await advance(flows, 0, firstBlock);
      const after = await advance(embedded, firstBlock, secondBlock);
      const images = await cache.afterLastBlock(
        passes.map((pass, i) => ({ pass, before: embedded[i]!.image!, after: after[i]!.image! })),
        timesteps,
        async () => (await advance(after, secondBlock, output)).map(({ image }) => image!),
      );
      // The output depends on nothing else that the blocks change.
      flows = after.map((flow, i) => ({ ...flow, image: images[i]! }));
    }
    flows = await advance(flows, cache ? output : 0, stages);
    return flows.map(({ velocity }) => velocity!);
  }
}

/** What the network is given for each pass: one object for passes with the same text, which tells that they share work. */
function inputs(latent: FloatTensor, timestep: FloatTensor, passes: readonly TransformerPass[]): Flow[] {
  const batch = latent.shape[0]!;
  const flows: Flow[] = [];
  for (const { context, pooled } of passes) {
    const twin = passes.findIndex((other) => other.context === context && other.pooled === pooled);
    flows.push(flows[twin] ?? { latent, timestep, context: repeatTo(context, batch), pooled: repeatTo(pooled, batch) });
  }
  return flows;
}

interface Segment {
  /** Stages that the segment runs: from `start` to before `end`. */
  readonly start: number;
  readonly end: number;
  readonly program: Lazy;
}

/** Where the network is to be cut, so that a pass can go around these stages: before and after every run of them. */
function edgesOf(stages: ReadonlySet<number>): number[] {
  return [...stages].flatMap((stage) => [
    ...(stages.has(stage - 1) ? [] : [stage]),
    ...(stages.has(stage + 1) ? [] : [stage + 1]),
  ]);
}

/** Streams that can run as one batch: of equal text length, and not too many image tokens together. */
function batches(flows: readonly Flow[], tokens: number): Flow[][] {
  const result: Flow[][] = [];
  for (const flow of flows) {
    const group = result.find(
      (other) =>
        other[0]!.context!.shape[1] === flow.context!.shape[1] && (other.length + 1) * tokens <= LARGEST_BATCH_TOKENS,
    );
    if (group) group.push(flow);
    else result.push([flow]);
  }
  return result;
}

function joinFlows(flows: readonly Flow[]): Flow {
  return Object.fromEntries(
    Object.keys(flows[0]!).map((name) => [name, joinBatches(flows.map((flow) => flow[name]!))]),
  );
}

function itemsOf(flow: Flow, start: number, count: number): Flow {
  return Object.fromEntries(Object.entries(flow).map(([name, tensor]) => [name, batchItems(tensor, start, count)]));
}

function requireLayers({ depth }: TransformerConfig, layers: readonly number[]): void {
  const wrong = layers.find((layer) => !Number.isInteger(layer) || layer < 0 || layer >= depth);
  if (wrong !== undefined) {
    throw new MmditxError(
      'bad-option',
      `There is no layer ${wrong} to skip: this transformer has layers 0 to ${depth - 1}.`,
    );
  }
}
