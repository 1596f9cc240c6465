%% @doc What a save needs from its surroundings: a key, a reservation, a root, and an announcement.
%%
%% Two modules implement it: {@link erllama_cache_host_erllama}, over the application `erllama',
%% and {@link erllama_cache_store}, built in. The writer calls them in the process that saves:
%%
%% <ul>
%% <li>`identify', first, with a slot held. Its error ends the save.</li>
%% <li>`reserve', next. Its error ends the save; `already_present' is counted.</li>
%% <li>`root', next. Its error ends the save. It exits when there is no such tier server.</li>
%% <li>`check': before a small file is written; for any other file between writing and publishing,
%%   and every 15 seconds while it is written or waits for its turn. Its error ends the save: the
%%   temporary file is removed, and the reservation is not cancelled, for it is another's.</li>
%% <li>`mark_published' and `announce', when the file has its name. After their errors the file
%%   stays.</li>
%% <li>`count', after a save that succeeded.</li>
%% <li>`cancel', when anything failed between `reserve' and the publication.</li>
%% </ul>
-module(erllama_cache_host).

-export([lease/0, lease_left/0, renew_every/0]).
-export_type([tier_srv/0, tier/0, identity/0, token/0, event/0]).

-type tier_srv() :: atom().
-type tier() :: disk | ram_file.
-type identity() :: {Key :: <<_:256>>, QuantByte :: byte(), Tokens :: binary()}.
%% The key, the byte that stands for the quant type, the tokens as u32 little-endian each.
-type token() :: reference().
-type event() :: {saved, erllama_cache_meta:save_reason()} | duplicate_dropped.

%% A reservation's lease in milliseconds: erllama's, which the built-in store shares.
-define(LEASE, 60000).
%% A save renews its reservation this often, in milliseconds.
-define(RENEW_EVERY, 15000).

%% The key of a save, and what the host makes it from. An error leaves nothing behind.
-callback identify(erllama_cache_meta:complete()) ->
    {ok, identity()} | {error, erllama_cache_meta:invalid()}.

%% Reserves a key for the calling process. `Size' is the file's size, or some bytes more.
-callback reserve(tier_srv(), tier(), Key :: binary(), Size :: non_neg_integer()) ->
    {ok, token()} | {error, already_present | conflict | term()}.

%% The directory to save in. Exits when the tier server is not there.
-callback root(tier_srv()) -> file:name_all() | {error, term()}.

%% Renews the reservation's lease of 60 seconds, or says that the reservation was lost.
-callback check(tier_srv(), Key :: binary(), token()) -> ok | {error, expired}.

%% The file has its name in the root, but has not been announced.
-callback mark_published(tier_srv(), Key :: binary(), token(), Root :: file:name_all()) ->
    ok | {error, expired}.

%% The save is complete. `Size' is the file's size in bytes, `Header' its first 48 bytes.
-callback announce(tier_srv(), Key :: binary(), token(), Size :: pos_integer(),
                   Header :: binary(), Tokens :: binary()) ->
    ok | {error, expired}.

%% Gives up the reservation, stale or not.
-callback cancel(tier_srv(), Key :: binary(), token()) -> ok.

%% Counts an event.
-callback count(tier_srv(), event()) -> ok.

%% @doc Milliseconds for which a reservation stands without being renewed.
-spec lease() -> pos_integer().
lease() -> ?LEASE.

%% @doc Milliseconds after which a save renews its reservation.
-spec renew_every() -> pos_integer().
renew_every() -> ?RENEW_EVERY.

%% @doc Milliseconds of the lease that must be left after each `check'. A host need not renew a
%% lease of which more is left: the save checks again before it ends.
-spec lease_left() -> pos_integer().
lease_left() -> ?LEASE - ?RENEW_EVERY.
