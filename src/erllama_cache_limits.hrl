%% What timeouts, limits and bounds may be: what the library's integers hold.
-define(MAX_TIMEOUT, 16#ffffffff).
-define(MAX_LIMIT, 16#7fffffff).
-define(MAX_BYTES, 16#ffffffffffffffff).

-define(IS_TIMEOUT(T),
        (T =:= infinity orelse (is_integer(T) andalso T >= 0 andalso T =< ?MAX_TIMEOUT))).
-define(IS_LIMIT(N), (is_integer(N) andalso N > 0 andalso N =< ?MAX_LIMIT)).
-define(IS_BYTES(N),
        (N =:= infinity orelse (is_integer(N) andalso N >= 0 andalso N =< ?MAX_BYTES))).
