/** What the text encoders' outputs become before they reach the transformer (SD3 paper, section 4 and figure 2a). */

import * as t from '../tensor/index.ts';
import type { ClipOutputs } from './clip.ts';

export interface Conditioning {
  /** [batch, length, contextWidth] */
  context: t.Tensor;
  /** [batch, pooledWidth] */
  pooled: t.Tensor;
}

/**
 * The two CLIPs side by side, filled with zeros to the width of T5, then T5's tokens; and both pooled vectors.
 * @param t5 [batch, tokens, contextWidth]
 */
export function joinEncoders(clipL: ClipOutputs, clipG: ClipOutputs, t5: t.Tensor): Conditioning {
  const clips = t.concat([clipL.hidden, clipG.hidden], 2);
  const missing = t.plus(t.size(t5, 2), t.times(-1, t.size(clips, 2)));
  return {
    context: t.concat([t.pad(clips, 2, 0, missing), t5], 1),
    pooled: t.concat([clipL.pooled, clipG.pooled], 1),
  };
}
