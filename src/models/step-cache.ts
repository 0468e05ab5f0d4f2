/** Experiment. */
import type { FloatTensor } from '../tensor/index.ts';
import type { TransformerPass } from './transformer.ts';

export interface PassState {
  readonly pass: TransformerPass;
  /** Image tokens before and after the first block. */
  readonly before: FloatTensor;
  readonly first: FloatTensor;
}

export interface StepCache {
  estimate(states: readonly PassState[], timesteps: ArrayLike<number>): FloatTensor[] | undefined;
  remember(states: readonly PassState[], last: readonly FloatTensor[]): void;
}
