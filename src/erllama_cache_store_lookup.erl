%% Stores by their names, for those who get the name of a store or of a host's tier server.
%%
%% @private
-module(erllama_cache_store_lookup).

-include("erllama_cache_store.hrl").

-export([keyed_by/1, borrower/1]).

%% What the keys of the store of this name are made of, if it runs here.
-spec keyed_by(atom()) -> {ok, erllama_cache_host:keyed_by()} | error.
keyed_by(Name) ->
    case erllama_cache_index:find_config(Name) of
        {ok, #config{keyed_by = KeyedBy}} -> {ok, KeyedBy};
        _ -> error
    end.

%% Who takes files from peers for it.
-spec borrower(atom()) -> {ok, none | #borrower{}} | error.
borrower(Name) ->
    case erllama_cache_index:find_config(Name) of
        {ok, #config{borrower = Borrower}} -> {ok, Borrower};
        _ -> error
    end.
