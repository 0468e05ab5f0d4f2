/** ONNX Runtime reports its use to its maker unless it is told not to, before it loads. Set the variable to 0 to allow it. */

process.env.ORT_DISABLE_TELEMETRY ??= '1';
